"""Loading: any example by its number as model inputs, exactly; batches; lengths without decoding."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_examples import cauldron_rows, picture_bytes, write_parquet
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from phi3v.data.conversations import (
    Conversation,
    DataError,
    Turn,
    answer_text,
    format_line,
    prompt_text,
)
from phi3v.data.convert import convert_files
from phi3v.data.dataset import ConversationDataset, collate
from phi3v.data.folder import LENGTHS, LineIndex, split_file
from phi3v.data.lengths import TokenCounter, count, count_turns, lengths, plot, summary_lines, write_statistics
from phi3v.demo.tiny import train_tokenizer
from phi3v.model.image_processing import Phi3VImageProcessor
from phi3v.model.processing import Phi3VProcessor
from phi3v.training.batches import BatchPlan, Grouping, Pick, PickedExamples, PlannedBatches


@pytest.fixture(scope="module")
def processor() -> Phi3VProcessor:
    texts = [f"Question {row}.{k}? Answer {row}.{k} What is it? A cat or a dog." for row in range(30) for k in range(3)]
    return Phi3VProcessor(Phi3VImageProcessor(num_crops=4, tile_size=28, num_img_tokens=4), train_tokenizer(texts, 400))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train: 12 rows of two pictures and three turns, to draw from; val: 3 rows."""
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(15, pictures=2, turns=3))
    for split, rows in (("train", "0:12"), ("val", "12:")):
        convert_files("cauldron", source, tmp_path / "data", split, rows=rows, turns="draw", num_crops=6)
    return tmp_path / "data"


def test_an_example_is_the_prompt_and_its_labelled_answer(data: Path, processor: Phi3VProcessor) -> None:
    dataset = ConversationDataset(data, "val", processor, num_crops=2)
    example = dataset[1]
    turn = dataset.selected(1).turns[0]
    assert example["id"] == "data-val-00000013"
    answer = processor.tokenizer(answer_text(turn), add_special_tokens=False)["input_ids"]
    assert example["labels"].tolist()[-len(answer) :] == answer == example["input_ids"].tolist()[-len(answer) :]
    assert (example["labels"][: -len(answer)] == -100).all()
    pictures = [dataset.pictures.open(path, "") for path in turn.images]
    inputs = processor(prompt_text(turn), images=pictures, num_crops=2)
    assert example["input_ids"].tolist()[: -len(answer)] == inputs["input_ids"][0].tolist()
    assert torch.equal(example["pixel_values"], inputs["pixel_values"])
    assert torch.equal(example["image_sizes"], inputs["image_sizes"])
    assert (example["input_ids"] == processor.image_token_id).sum() > 0
    assert processor.image_processor.num_crops == 4  # the caller's stays


def test_all_turns_are_the_whole_conversation_in_one(data: Path, processor: Phi3VProcessor) -> None:
    dataset = ConversationDataset(data, "train", processor, turns="all")
    example, turns = dataset[3], dataset.conversation(3).turns
    text = "".join(prompt_text(turn) + answer_text(turn) for turn in turns)
    pictures = [dataset.pictures.open(path, "") for path in dataset.conversation(3).images]
    assert example["input_ids"].tolist() == processor(text, images=pictures, num_crops=6)["input_ids"][0].tolist()
    labels = example["labels"][example["labels"] != -100].tolist()
    answers = [processor.tokenizer(answer_text(turn), add_special_tokens=False)["input_ids"] for turn in turns]
    assert labels == [token for answer in answers for token in answer]


def test_later_turns_may_bring_pictures_and_text_only_turns_need_none(
    tmp_path: Path, processor: Phi3VProcessor
) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(picture_bytes(1, "PNG"))
    turns = (Turn(("a.png",), "What is it?", "A cat"), Turn(("b.png",), "Answer?", "dog"), Turn((), "Question?", "A"))
    text_only = Conversation("t", "s", (Turn((), "What?", "A cat"),))
    (tmp_path / "my_train.jsonl").write_bytes(format_line(Conversation("a", "s", turns)) + format_line(text_only))
    dataset = ConversationDataset(tmp_path, "train", processor)
    assert dataset.num_crops == 16
    example = dataset[0]
    assert len(example["image_sizes"]) == 2
    single = prompt_text(turns[0]) + answer_text(turns[0]) + prompt_text(turns[1], 2) + answer_text(turns[1])
    single += prompt_text(turns[2]) + answer_text(turns[2])
    picture = dataset.pictures.open("a.png", "")
    whole = processor(single, images=[picture, picture], num_crops=16)["input_ids"][0].tolist()
    assert example["input_ids"].tolist() == whole
    assert dataset[1]["pixel_values"].shape[0] == 0
    assert (
        dataset[1]["input_ids"].tolist()
        == processor(prompt_text(text_only.turns[0]) + answer_text(text_only.turns[0]))["input_ids"][0].tolist()
    )
    mixed = collate([dataset[1], dataset[0]], 0)
    assert mixed["pixel_values"].shape[0] == example["pixel_values"].shape[0]
    assert "pixel_values" not in collate([dataset[1]], 0)


def test_one_turn_is_drawn_an_epoch_by_seed(data: Path, processor: Phi3VProcessor) -> None:
    def drawn(epoch: int, seed: int = 42) -> list[str]:
        dataset = ConversationDataset(data, "train", processor, seed=seed)
        dataset.set_epoch(epoch)
        assert all(len(dataset.selected(i).turns) == 1 and len(dataset.selected(i).images) == 2 for i in range(12))
        return [dataset.selected(index).turns[0].user for index in range(len(dataset))]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)
    seen = {question for epoch in range(20) for question in drawn(epoch)}
    assert len(seen) == 36  # every question of every row comes up


def _user_in_process(dataset: ConversationDataset, wait: Any, result: Any) -> None:
    wait.wait()
    result.put((dataset.epoch, dataset[2]["id"], [dataset.selected(index).turns[0].user for index in range(12)]))


def test_a_loader_process_that_lives_on_sees_the_new_epoch(data: Path, processor: Phi3VProcessor) -> None:
    dataset = ConversationDataset(data, "train", processor)
    dataset[0]  # files are open in this process
    context = multiprocessing.get_context("fork")
    wait, result = context.Event(), context.Queue()
    process = context.Process(target=_user_in_process, args=(dataset, wait, result))
    process.start()
    dataset.set_epoch(7)
    wait.set()
    seen = result.get(timeout=60)
    process.join()
    assert seen == (7, dataset[2]["id"], [dataset.selected(index).turns[0].user for index in range(12)])


def test_collate_weighs_every_example_the_same() -> None:
    def example(prompt: int, answer: int) -> dict:
        ids = torch.arange(1, prompt + answer + 1)
        labels = torch.cat([torch.full((prompt,), -100), ids[prompt:]])
        empty = {"pixel_values": torch.empty(0, 3, 0, 0), "image_sizes": torch.empty(0, 2, dtype=torch.int64)}
        return {"id": "x", "input_ids": ids, "labels": labels, **empty}

    batch = collate([example(3, 4), example(5, 1)], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 99]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch["labels"].tolist() == [[-100] * 3 + [4, 5, 6, 7], [-100] * 5 + [6, -100]]
    assert batch["loss_weights"].tolist() == [[0, 0, 0, 0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0, 0, 1, 0]]


def test_lengths_are_those_of_the_loaded_examples(data: Path, processor: Phi3VProcessor) -> None:
    for turns in ("all", "first"):
        dataset = ConversationDataset(data, "train", processor, turns=turns)
        assert lengths(dataset) == [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    drawn = ConversationDataset(data, "train", processor)
    longest = [0] * len(drawn)
    for epoch in range(20):
        drawn.set_epoch(epoch)
        longest = [max(longest[index], len(drawn[index]["input_ids"])) for index in range(len(drawn))]
    assert lengths(drawn) == longest


def test_lengths_are_counted_once_and_by_several_processes(
    data: Path, processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = ConversationDataset(data, "train", processor)
    counted = count(dataset).tolist()
    alone = [example[0] for example in counted]
    with monkeypatch.context() as several:
        several.setattr("phi3v.data.lengths.PART", 5)
        assert count(dataset, processes=2).tolist() == counted
    assert lengths(dataset) == alone
    (kept,) = (data / LENGTHS).glob("*.npy")

    def never(*arguments: object) -> None:
        raise AssertionError("counted again")

    with monkeypatch.context() as no_more:
        no_more.setattr("phi3v.data.lengths.count", never)
        assert lengths(ConversationDataset(data, "train", processor)) == alone
        # Anything that changes a length is another file.
        for other in ({"num_crops": 1}, {"turns": "first"}):
            with pytest.raises(AssertionError, match="counted again"):
                lengths(ConversationDataset(data, "train", processor, **other))
        lines = (data / "train.jsonl").read_bytes()
        (data / "train.jsonl").write_bytes(lines.replace(b"Question 3", b"Quest 3"))
        with pytest.raises(AssertionError, match="counted again"):
            lengths(ConversationDataset(data, "train", processor))
        (data / "train.jsonl").write_bytes(lines)
        kept.write_bytes(kept.read_bytes()[:-8])
        with pytest.raises(AssertionError, match="counted again"):
            lengths(ConversationDataset(data, "train", processor))
    assert lengths(dataset) == alone
    assert np.load(kept).tolist() == counted


def test_lengths_of_a_folder_made_by_hand_are_not_kept(data: Path, processor: Phi3VProcessor) -> None:
    (data / "dataset.json").unlink()
    dataset = ConversationDataset(data, "train", processor, turns="all")
    assert lengths(dataset) == [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    assert not (data / LENGTHS).exists()


def test_processes_of_a_job_share_the_cores_where_each_counts(
    data: Path, processor: Phi3VProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "dataset.json").unlink()
    dataset, asked = ConversationDataset(data, "train", processor), list[int]()
    found = count(dataset)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("phi3v.data.lengths.count", lambda dataset, processes: asked.append(processes) or found)
    for processes in (16, 2):
        lengths(dataset, processes)
    assert asked == [4, 1]
    summary_lines(dataset, found=found)
    assert asked == [4, 1]


def test_lengths_are_counted_where_nothing_can_be_kept(
    data: Path, processor: Phi3VProcessor, capsys: pytest.CaptureFixture
) -> None:
    (data / LENGTHS).write_bytes(b"a file where the folder should be")
    dataset = ConversationDataset(data, "train", processor)
    assert lengths(dataset) == count(dataset)[:, 0].tolist()
    assert "every process of the job counts the lengths" in capsys.readouterr().err


def test_statistics_are_those_of_the_loaded_examples(data: Path, processor: Phi3VProcessor) -> None:
    lines = write_statistics(data, processor)
    statistics = json.loads((data / "statistics.json").read_text())
    dataset = ConversationDataset(data, "val", processor, turns="first")
    values = statistics["val"]
    assert values["examples"] == 3
    assert values["images"] == 6
    assert values["turns"] == 9
    assert values["tiles"]["mean"] == sum(len(dataset[index]["pixel_values"]) for index in range(3)) / 3
    drawn = ConversationDataset(data, "val", processor)
    lengths = []
    for epoch in range(60):
        drawn.set_epoch(epoch)
        lengths += [len(drawn[index]["input_ids"]) for index in range(3)]
    assert values["tokens"]["mean"] == pytest.approx(sum(lengths) / len(lengths), rel=0.02)
    assert sum(values["histogram"]["counts"]) == 3
    # One turn of each is drawn, and every turn was in one of the epochs.
    assert values["longest"]["tokens"] == max(lengths)
    assert values["longest"]["labels"] <= values["answer_tokens"]["max"]
    assert any("val.jsonl: 3 examples" in line for line in lines)
    assert plot(statistics).count("<rect") == 48


def test_the_summary_says_what_training_and_evaluation_will_lose(tmp_path: Path, processor: Phi3VProcessor) -> None:
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(40, 30), (400, 300)]):
        (tmp_path / f"images/{number}.jpg").write_bytes(picture_bytes(number, "JPEG", size))
    turns = [
        (Turn(("0.jpg",), "What?", "Yes"), Turn((), "And?", "No")),
        (Turn(("1.jpg", "0.jpg"), "What?", "word " * 50),),
        (Turn((), "What?", "No"),),
    ]
    examples = [Conversation(f"a-{number}", "a", each) for number, each in enumerate(turns)]
    (tmp_path / "train.jsonl").write_bytes(b"".join(map(format_line, examples)))
    dataset = ConversationDataset(tmp_path, "train", processor, num_crops=1)
    tokens, answers, number_of_turns, pictures, shrunk = count(dataset).T.tolist()
    assert number_of_turns == [2, 1, 1]
    assert pictures == [1, 2, 0]
    assert shrunk == [0, 1, 0]
    assert answers[1] == max(answers) > 50 > answers[0]
    assert tokens == lengths(dataset)
    facts, lengths_line, *warnings = summary_lines(dataset, tokens[0], 20)
    assert "3 examples, 4 turns, 3 pictures, 1 example without a picture" in facts
    assert f"median {tokens[0]:,}, maximum {tokens[1]:,} (line 2)" in lengths_line
    assert [warning.partition("train.jsonl: ")[2][:9] for warning in warnings] == [
        "1 of 3 pi",
        "1 example",
        "1 example",
    ]
    assert f"{answers[1]} (line 2)" in warnings[2]
    assert len(summary_lines(ConversationDataset(tmp_path, "train", processor, num_crops=400))) == 2


def test_a_picture_that_the_models_tiles_cannot_hold_is_named_before_training(
    tmp_path: Path, processor: Phi3VProcessor
) -> None:
    tile = processor.image_processor.tile_size
    (tmp_path / "images").mkdir()
    (tmp_path / "images/thin.png").write_bytes(picture_bytes(1, "PNG", (tile + 1, 1)))
    (tmp_path / "train.jsonl").write_bytes(format_line(Conversation("a", "a", (Turn(("thin.png",), "Q?", "A"),))))
    with pytest.raises(DataError, match=f"train.jsonl:1: image 'thin.png': {tile + 1} x 1 pixels.*1 tiles of {tile}"):
        lengths(ConversationDataset(tmp_path, "train", processor, num_crops=1))
    assert lengths(ConversationDataset(tmp_path, "train", processor, num_crops=2))


@pytest.mark.parametrize("size", [(2169, 2890), (1000, 1000), (10, 500)])
def test_tiles_are_counted_as_the_processor_cuts_them(processor: Phi3VProcessor, size: tuple[int, int]) -> None:
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=16, tile_size=28, num_img_tokens=4), processor.tokenizer)
    (counts,) = count_turns(processor, [Turn(("page.png",), "<|image_1|>\nWhat is it?", "A cat")], [[size]])
    cut = processor.image_processor(Image.new("RGB", size))
    assert counts.tiles == len(cut["pixel_values"])
    assert counts.image == cut["num_img_tokens"][0]


def test_a_counter_counts_what_the_processor_counts(data: Path, processor: Phi3VProcessor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TokenCounter.of(tmp_path)
    processor.save_pretrained(tmp_path / "model")
    counter = TokenCounter.of(tmp_path / "model")
    expected = count(ConversationDataset(data, "train", processor))
    assert expected[:, 0].min() > 0
    assert (count(ConversationDataset(data, "train", counter)) == expected).all()
    # The count that validate.py stores is the one that training looks for.
    assert lengths(ConversationDataset(data, "train", counter)) == expected[:, 0].tolist()
    assert len(list((data / LENGTHS).glob("*.npy"))) == 1
    lengths(ConversationDataset(data, "train", processor))
    assert len(list((data / LENGTHS).glob("*.npy"))) == 1


def test_a_counter_ignores_truncation_and_padding_of_the_file(processor: Phi3VProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    turns = [Turn((), "What is it?", "A cat"), Turn((), "Why?", "It is")]
    expected = count_turns(processor, turns, [(), ()])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert count_turns(TokenCounter.of(tmp_path), turns, [(), ()]) == expected
    processor.tokenizer(["a", "a longer text"], padding="max_length", max_length=40)
    assert count_turns(processor, turns, [(), ()]) == expected


def test_lines_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b"x" * (number % 300) + b"\n" for number in range(5000)]
    path.write_bytes(b"".join(lines) + b"last")
    index = LineIndex(path)
    assert len(index) == 5001
    assert [index[number] for number in (0, 1, 299, 4999, 5000)] == [
        lines[0],
        lines[1],
        lines[299],
        lines[4999],
        b"last",
    ]
    assert pickle.loads(pickle.dumps(index))[4999] == lines[4999]
    path.write_bytes(b"")
    assert len(LineIndex(path)) == 0
    with pytest.raises(DataError, match="became shorter"):
        index[3000]


def test_what_cannot_be_loaded_is_named(data: Path, tmp_path: Path, processor: Phi3VProcessor) -> None:
    with pytest.raises(
        DataError, match=r"split 'test': got train\.jsonl, val\.jsonl; expected exactly one test\.jsonl"
    ):
        ConversationDataset(data, "test", processor)
    with pytest.raises(DataError, match="no such folder"):
        split_file(tmp_path / "none", "train")
    dataset = ConversationDataset(data, "val", processor)
    with pytest.raises(IndexError):
        dataset[3]
    image = data / "images" / dataset.conversation(0).images[0]
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(DataError, match=r"val\.jsonl:1: image .*: cannot be (opened|decoded)"):
        dataset[0]
    image.unlink()
    image.symlink_to("/etc/hostname")
    with pytest.raises(DataError, match=r"val\.jsonl:1: image .* is a link to a file outside"):
        dataset[0]
    image.unlink()
    image.write_bytes(picture_bytes(0, "PNG", (4000, 1)))
    with pytest.raises(DataError, match=r"val\.jsonl:1: example 'data-val-00000012': "):
        dataset[0]
    (data / "val.jsonl").write_bytes(b'{"id": 1}\n')
    with pytest.raises(DataError, match=r"val\.jsonl:1: field `id`"):
        ConversationDataset(data, "val", processor)[0]


class Counted(PickedExamples):
    """Notes in shared memory how many examples were loaded, by whichever process."""

    def __init__(self, dataset: ConversationDataset) -> None:
        super().__init__(dataset)
        self.loaded = multiprocessing.Value("i", 0)

    def __getitem__(self, pick: Pick) -> Any:
        with self.loaded.get_lock():
            self.loaded.value += 1
        return super().__getitem__(pick)


@pytest.mark.parametrize("grouping", ["fixed", "length", "packed"])
def test_seed_epoch_and_position_are_all_that_resuming_needs(
    tmp_path: Path, processor: Phi3VProcessor, grouping: Grouping
) -> None:
    source = write_parquet(tmp_path / "a.parquet", cauldron_rows(21, turns=3))
    folder = tmp_path / "data"
    convert_files("cauldron", source, folder, "train", turns="draw", num_crops=2)

    def batches(epoch: int, step: int, workers: int, rank: int) -> tuple[list[Any], int]:
        """(batches from `step` on of a process that starts anew, examples it loaded)."""
        dataset = ConversationDataset(folder, "train", processor)
        plan = BatchPlan(
            examples=21, batch_size=8, micro_batch_size=2, processes=2, seed=5, grouping=grouping,
            lengths=lengths(dataset), max_tokens=500 if grouping == "packed" else None,
        )  # fmt: skip
        examples = Counted(dataset)
        sampler = PlannedBatches(plan, rank)
        loader: DataLoader = DataLoader(
            examples, batch_sampler=sampler, num_workers=workers, multiprocessing_context="fork" if workers else None,
            collate_fn=lambda picked: (picks_of(picked), collate([example for example, _ in picked], 0)),
        )  # fmt: skip
        sampler.epoch, sampler.first_step = epoch, step
        dataset.set_epoch(epoch)
        return list(loader), examples.loaded.value

    def picks_of(picked: list[Any]) -> list[tuple[str, int, bool]]:
        return [(example["id"], pick.index, pick.ends_step) for example, pick in picked]

    seen: list[str] = []
    for rank in (0, 1):
        whole, _ = batches(1, 0, 0, rank)
        ends = [number for number, (picks, _) in enumerate(whole, 1) if picks[0][2]]
        seen += [name for picks, _ in whole for name, *_ in picks]
        for step, workers in ((1, 2), (2, 0), (2, 1)):
            rest, loaded = batches(1, step, workers, rank)
            following = whole[ends[step - 1] :]
            assert [picks for picks, _ in rest] == [picks for picks, _ in following]
            for (_, one), (_, other) in zip(rest, following, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[key], other[key]) for key in one)
            assert loaded == sum(len(picks) for picks, _ in rest)  # what was trained on is not loaded again
        assert [picks for picks, _ in batches(2, 0, 0, rank)[0]] != [picks for picks, _ in whole]
    assert sorted(set(seen)) == [f"data-train-{number:08d}" for number in range(21)]
