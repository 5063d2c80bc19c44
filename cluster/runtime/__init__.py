"""Starting, watching and ending the processes of an engine on Ray."""
