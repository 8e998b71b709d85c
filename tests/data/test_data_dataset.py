"""The dataset that trainers read: lazy rows, and what TRL and the data loader make of them."""

import json
import pickle

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from trl.data_utils import is_conversational, prepare_multimodal_messages

from cppo.data import load_records, load_rows, to_dataset


def picture(colour):
    return Image.new("RGB", (3, 2), colour)


@pytest.fixture
def source():
    structured = [{"role": "user", "content": [{"type": "text", "text": "Before"}, {"type": "image"}]}]
    return load_rows(
        [
            {"prompt": "two", "answer": "a", "images": [picture("red"), picture("blue")], "id": "first"},
            {"prompt": "none", "answer": "b", "id": "second"},
            {"prompt": structured, "answer": "c", "images": [picture("lime")], "id": "third"},
        ]
    )


def test_rows(source):
    dataset = to_dataset(source)
    assert len(dataset) == 3
    assert sorted(dataset.column_names) == ["answer", "images", "prompt", "sample_id"]
    first, second, third = dataset
    assert first["prompt"] == [{"role": "user", "content": "two"}]
    assert [image.getpixel((0, 0)) for image in first["images"]] == [(255, 0, 0), (0, 0, 255)]
    assert second == {
        "prompt": [{"role": "user", "content": "none"}],
        "images": [],
        "answer": "b",
        "sample_id": "second",
    }
    assert third["prompt"] == source[2].prompt
    assert list(dataset["answer"]) == ["a", "b", "c"]
    assert dataset.select([2])[0]["sample_id"] == "third"
    assert set(dataset.remove_columns(["answer", "sample_id"])[0]) == {"prompt", "images"}


def test_reference_columns_of_tasks():
    source = load_records("tasks:digits?n=3")
    row = to_dataset(source)[2]
    assert row["response"] == source[2].response
    assert row["perception_spans"] == [list(span) for span in source[2].perception_spans]
    assert row["sample_id"] == source[2].id


def test_choices_reach_the_trainer(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "q", "answer": "B", "choices": ["red", "blue"]}\n{"prompt": "r", "answer": "7"}\n')
    source = load_records(str(file))
    assert [record.choices for record in source] == [("red", "blue"), None]
    assert [row["choices"] for row in to_dataset(source)] == [["red", "blue"], []]


def test_nothing_is_decoded_until_a_row_is_asked_for(tmp_path):
    picture("red").save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "a", "image": "a.png"}')
    dataset = to_dataset(load_records(str(tmp_path / "rows.jsonl")))
    picture("blue").save(tmp_path / "a.png")
    assert dataset[0]["images"][0].getpixel((0, 0)) == (0, 0, 255)


def test_repeated_rows_share_their_images_but_no_list(tmp_path):
    """The rollouts of a prompt are asked for as one repeated index."""
    for name in ("a.png", "b.png"):
        picture("red").save(tmp_path / name)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    rows = [{"prompt": prompt, "answer": name, "images": ["a.png", "b.png"]} for name in "xy"]
    repeated = to_dataset(load_rows(rows, folder=tmp_path)).__getitems__([1, 1, 0, 1])
    assert [row["answer"] for row in repeated] == ["y", "y", "x", "y"]
    assert repeated[0]["images"][1] is repeated[3]["images"][1]
    repeated[0]["images"].clear()
    repeated[0]["prompt"][0]["content"].clear()
    repeated[0]["prompt"].append("changed")
    assert len(repeated[1]["images"]) == 2
    assert [row["prompt"] for row in repeated[1:]] == [prompt] * 3


def test_system_prompt(source):
    own = load_rows(
        [
            {
                "prompt": [{"role": "system", "content": "Mine."}, {"role": "user", "content": "q"}],
                "answer": "a",
            }
        ]
    )
    rows = list(to_dataset(source, system_prompt="Think first."))
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Think first."},
        {"role": "user", "content": "two"},
    ]
    assert rows[2]["prompt"][0] == {"role": "system", "content": [{"type": "text", "text": "Think first."}]}
    assert to_dataset(own, system_prompt="Think first.")[0]["prompt"] == own[0].prompt


def test_prompt_suffix(source):
    """The user's last message ends with it; no system message comes, ids stay, and the source keeps its own prompts."""
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    more = load_rows(
        [{"prompt": parts, "answer": "a", "images": [picture("red")]}, {"prompt": chat, "answer": "a"}], name="more"
    )
    prompts = [row["prompt"] for rows in (source, more) for row in to_dataset(rows, prompt_suffix="Think first.")]
    assert prompts == [
        [{"role": "user", "content": "two Think first."}],
        [{"role": "user", "content": "none Think first."}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Before"},
                    {"type": "image"},
                    {"type": "text", "text": " Think first."},
                ],
            }
        ],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which? Think first."}]}],
        [*chat[:2], {"role": "user", "content": "c Think first."}],
    ]
    assert to_dataset(source)[0]["prompt"] == [{"role": "user", "content": "two"}]
    assert to_dataset(more, prompt_suffix="Think first.")[0]["sample_id"] == more[0].id


def test_records_are_read_with_a_suffix():
    plain, suffixed = load_records("tasks:digits?n=2"), load_records("tasks:digits?n=2", prompt_suffix="Think.")
    assert [record.prompt for record in suffixed] == [f"{record.prompt} Think." for record in plain]
    assert [record.id for record in suffixed] == [record.id for record in plain]
    assert to_dataset(suffixed)[1]["prompt"][0]["content"] == suffixed[1].prompt


def test_the_digest_is_of_the_rows_in_their_order_wherever_they_lie(tmp_path):
    def written(folder, *rows):
        (tmp_path / folder).mkdir(exist_ok=True)
        picture("red").save(tmp_path / folder / "red.png")
        picture("red").save(tmp_path / folder / "blue.png")
        lines = [{"prompt": "How many?", "images": [f"{name}.png"], "answer": answer} for name, answer in rows]
        file = tmp_path / folder / "rows.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return load_records(str(file))

    first, second = ("red", "1"), ("blue", "2")
    source = written("here", first, second)
    same = source.digest()
    assert same == written("there", first, second).digest() == source.keep([1, 0]).keep([1, 0]).digest()
    others = [(second, first), (first,), (first, ("blue", "3")), (first, ("red", "2"))]
    assert len({same, *(written("there", *rows).digest() for rows in others)}) == 5
    tasks = [load_records(f"tasks:digits?{options}").digest() for options in ("n=3", "n=3", "n=4", "n=3&seed=1")]
    assert tasks[0] == tasks[1] != tasks[2]
    assert len(set(tasks)) == 3


def test_trl_puts_every_image_in_its_place(source):
    rows = list(to_dataset(source, system_prompt="Think first."))
    assert is_conversational(rows[0])
    kinds = []
    for row in rows:
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        user = messages[-1]["content"]
        kinds.append([part["type"] for part in user])
        assert [part["image"] for part in user if part["type"] == "image"] == row["images"]
    assert kinds == [["image", "image", "text"], ["text"], ["text", "image"]]


def test_pickled_and_read_by_a_worker_process(source):
    dataset = to_dataset(source, system_prompt="Think first.")
    expected = list(dataset)
    assert list(pickle.loads(pickle.dumps(dataset))) == expected
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=list)
    assert [row for batch in loader for row in batch] == expected
