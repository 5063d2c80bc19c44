"""`eagleray profile`: where the time of a step goes on the GPU."""
