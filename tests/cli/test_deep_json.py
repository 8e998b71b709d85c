"""Files of JSON that are cut, nested without end, or of another shape: one line each, whatever the command."""

import json

import pytest

DEEP = ("[" * 100_000, '{"a":' * 50_000, "[" * 20_000 + "]" * 20_000)
CUT = ("", "{", '{"vision_config": {"a"', "nul", '"')


@pytest.mark.parametrize("text", [*DEEP, *CUT, "[]", "3"])
def test_a_models_configuration(refused, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    message = refused("eval", "--model", tmp_path, "--data", "tasks:digits?n=1")
    assert message.startswith("model: ")
    assert "config.json" in message


@pytest.mark.parametrize("text", [*DEEP, *CUT])
def test_a_row_of_data(refused, tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'x', 'answer': 'y'})}\n{text or ' nul '}\n")
    message = refused("eval", "--model", "micro", "--data", file)
    assert f"{file}" in message
    assert "line 2" in message
