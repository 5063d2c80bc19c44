"""The page of all options."""

from dataclasses import fields

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.reference import page, rows_of
from eagleray.deploy.serve.config import own_names


def test_every_option_is_on_the_page_once_with_what_is_said_of_it() -> None:
    lines = list(page())
    names = [field.name for owner in (EngineConfig, SamplingParams) for field in fields(owner)] + sorted(own_names())
    for name in names:
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == names.count(name)
    assert "| `min_p` | `float` | `0.0` | a number from 0 to 1 | leave out tokens less likely than" in "\n".join(lines)
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines if line.startswith("|"))


def test_rows_say_name_type_default_values_and_help() -> None:
    rows = {row.name: row for row in rows_of(EngineConfig)}
    assert rows["model"].default == ""
    assert rows["dtype"][1:4] == ("str", "auto", "auto, float32, bfloat16, float16")
    assert rows["max_model_len"][1:4] == ("int | None", "None", "a whole number of at least 1, or None")
