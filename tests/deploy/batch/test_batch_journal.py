"""The journal of a batch: whatever happened to an earlier job, results are read back whole, once, or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.deploy.batch.input import Survey, read_lines, survey
from eagleray.deploy.batch.journal import Identity, Journal, read_identity, sidecar
from eagleray.deploy.batch.rows import Answer, RowError, custom_id, parse, recorded, refusal, result
from support.batch_files import row, write_rows

NUM_ROWS = 6


@pytest.fixture
def input(tmp_path: Path) -> Path:
    file = tmp_path / "in.jsonl"
    write_rows(file, (row(index) for index in range(NUM_ROWS)))
    return file


@pytest.fixture
def known(input: Path) -> Survey:
    return survey(input)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.partial"


def identity(known: Survey, model: str = "/models/a") -> Identity:
    return Identity(known.size, known.sha256, model)


def results(input: Path, known: Survey) -> list[bytes]:
    """With a failure for every third row."""
    lines = list(read_lines(input, known))
    return [result(line, Answer(200 if line.number % 3 else 500, b'{"id": "x"}')) for line in lines]


def written(partial: Path, known: Survey, texts: list[bytes]) -> None:
    with Journal(partial, identity(known)) as journal:
        for text in texts:
            journal.append(text)


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines(input: Path, known: Survey, partial: Path) -> None:
    texts = results(input, known)[:4]
    written(partial, known, texts)
    whole = b"".join(texts[:3])
    for size in range(1, len(whole) + 1):
        partial.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        with Journal(partial, identity(known)) as journal:
            done = journal.recover(known)
            assert (done.num_rows, done.num_failed) == (kept, kept // 3)
            assert list(done.lines) == [0] + [1] * kept + [0] * (NUM_ROWS - kept)
            journal.append(texts[kept])
        assert partial.read_bytes() == b"".join(texts[: kept + 1])


@pytest.mark.parametrize("damage", [b"\x00" * 40 + b"\n", b'{"id": "x"}\n', b'{"id": "batch_req_2", "custom', b"[]\n"])
def test_what_lost_power_left_is_cut_off_with_all_after_it(
    input: Path, known: Survey, partial: Path, damage: bytes
) -> None:
    texts = results(input, known)
    written(partial, known, texts[:2])
    with partial.open("ab") as file:
        file.write(damage)
        file.write(texts[3] if damage.endswith(b"\n") else b"")
    with Journal(partial, identity(known)) as journal:
        assert journal.recover(known).num_rows == 2
    assert partial.read_bytes() == b"".join(texts[:2])


def test_results_of_another_input_or_model_are_refused_and_kept(input: Path, known: Survey, partial: Path) -> None:
    texts = results(input, known)
    written(partial, known, texts[:2])
    with pytest.raises(ValueError, match=r"begun with model '/models/a' and not '/models/b'.*remove it to begin anew"):
        Journal(partial, identity(known, "/models/b"))
    write_rows(input, (row(index) for index in range(NUM_ROWS + 1)))
    with pytest.raises(
        ValueError, match=r"begun with input_bytes \d+ and not \d+, input_sha256 .* run it with the same"
    ):
        Journal(partial, identity(survey(input)))
    assert partial.read_bytes() == b"".join(texts[:2])


def test_a_file_that_is_no_journal_is_refused_and_kept(known: Survey, partial: Path) -> None:
    partial.write_text("my own notes\n")
    with pytest.raises(ValueError, match=r"no out\.jsonl\.partial\.json that says what it belongs to; move it away"):
        Journal(partial, identity(known))
    sidecar(partial).write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match="is not what a batch job writes"):
        Journal(partial, identity(known))
    assert partial.read_text() == "my own notes\n"


def test_results_that_the_input_has_no_row_for_are_refused(input: Path, known: Survey, partial: Path) -> None:
    texts = results(input, known)
    wrong_id = texts[1].replace(b"row 1", b"row 7")
    beyond = texts[1].replace(b"batch_req_2", b"batch_req_70")
    for last in (texts[0], wrong_id, beyond):
        partial.unlink(missing_ok=True)
        written(partial, known, [texts[0], last])
        with Journal(partial, identity(known)) as journal, pytest.raises(ValueError, match="somebody else wrote there"):
            journal.recover(known)


HOLD = """
import sys
from pathlib import Path
from eagleray.deploy.batch.journal import Identity, Journal
journal = Journal(Path(sys.argv[1]), Identity(int(sys.argv[2]), sys.argv[3], "/models/a"))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_job_is_refused_while_the_first_lives(input: Path, known: Survey, partial: Path) -> None:
    text = results(input, known)[0]
    written(partial, known, [text])
    command = [sys.executable, "-c", HOLD, str(partial), str(known.size), known.sha256]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"another job writes .*out.jsonl.partial at this moment; wait for it"):
            Journal(partial, identity(known))
        other.kill()
    with Journal(partial, identity(known)) as journal:
        assert journal.recover(known).num_rows == 1


def test_a_job_that_did_nothing_leaves_nothing(known: Survey, partial: Path) -> None:
    with Journal(partial, identity(known)):
        assert read_identity(partial) == identity(known)
    assert not partial.exists()
    assert not sidecar(partial).exists()


def test_the_output_appears_whole_and_the_journal_goes(input: Path, known: Survey, partial: Path) -> None:
    texts, output = results(input, known), partial.with_name("out.jsonl")
    with Journal(partial, identity(known)) as journal:
        for text in texts:
            journal.append(text)
        assert not output.exists()
        journal.finish(lambda file: os.rename(file, output))
    assert output.read_bytes() == b"".join(texts)
    assert [file.name for file in sorted(partial.parent.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_a_full_disk_ends_the_job_and_leaves_what_is_whole(input: Path, known: Survey, partial: Path) -> None:
    resource = pytest.importorskip("resource")
    texts = results(input, known)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(partial, identity(known)) as journal:
        journal.append(texts[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(texts[0]) + 10, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                journal.append(texts[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert partial.read_bytes() == texts[0] + texts[1][:10]
    with Journal(partial, identity(known)) as journal:
        assert journal.recover(known).num_rows == 1


def test_lines_are_those_of_the_file_and_ids_that_come_again_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    write_rows(file, [row(0), "", "no json", row(1), row(0), "[1]", "   ", row(0), {"custom_id": "row 1"}])
    known = survey(file)
    assert (known.num_rows, known.size) == (7, file.stat().st_size)
    lines = list(read_lines(file, known))
    assert [(line.number, line.duplicate_of) for line in lines] == [
        *[(1, None), (3, None), (4, None), (5, 1), (6, None), (8, 1), (9, 4)],
    ]
    assert [custom_id(line.text) for line in lines] == ["row 0", None, "row 1", "row 0", None, "row 0", "row 1"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(input: Path, known: Survey) -> None:
    marked = input.with_name("marked.jsonl")
    marked.write_text(input.read_text(), encoding="utf-8-sig")
    of_marked = survey(marked)
    assert (of_marked.ids, of_marked.num_rows) == (known.ids, known.num_rows)
    assert list(read_lines(marked, of_marked)) == list(read_lines(input, known))
    marked.write_text("\n" + input.read_text(), encoding="utf-8-sig")
    assert survey(marked).num_rows == known.num_rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_an_input_of_utf_16_is_refused_whole(input: Path, encoding: str) -> None:
    input.write_bytes(input.read_text().encode(encoding))
    with pytest.raises(ValueError, match=r"the input .*in\.jsonl is not UTF-8 text, but UTF-16"):
        survey(input)


def test_an_input_that_changes_while_it_is_read_is_noticed(input: Path, known: Survey) -> None:
    before = input.read_text()
    for changed in (before + "{}\n", before.replace("row 3", "row 9"), before[: before.rindex("\n", 0, -1) + 1]):
        input.write_text(changed)
        with pytest.raises(ValueError, match="changed while it was read"):
            list(read_lines(input, known))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_input_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="holds no row"):
        survey(file)


def test_a_row_that_is_nested_too_deeply_fails_alone(input: Path) -> None:
    deep = '{"custom_id": "deep", "method": "POST", "url": "/v1/completions", "body": ' + "[" * 100_000 + "]" * 100_000
    input.write_text(input.read_text() + deep + "}\n")
    known = survey(input)
    *others, last = read_lines(input, known)
    assert (known.num_rows, len(others)) == (NUM_ROWS + 1, NUM_ROWS)
    assert [parse(line).custom_id for line in others] == [f"row {index}" for index in range(NUM_ROWS)]
    with pytest.raises(RowError, match=f"line {NUM_ROWS + 1} is not a row: it is nested too deeply") as caught:
        parse(last)
    assert recorded(refusal(last, caught.value)) == (NUM_ROWS + 1, None, False)
