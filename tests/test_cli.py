"""The command as people type it: a process, its output streams and its exit status."""

import csv
import fcntl
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = ROOT / "examples" / "lines"
SAMPLES = sorted(path for path in LINES.iterdir() if path.suffix != ".txt")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def trocr_fast(*arguments: object, stdin: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trocr_fast", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=ENVIRONMENT, timeout=120
    )


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad pictures side by side."""
    folder = tmp_path_factory.mktemp("mixed")
    for sample in SAMPLES[:3]:
        (folder / sample.name).write_bytes(sample.read_bytes())
    data = SAMPLES[3].read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "noise.jpg").write_bytes(bytes(range(256)) * 8)
    (folder / "torn.png").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not a picture")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_folder_of_good_and_bad_pictures(mixed_folder: Path) -> None:
    done = trocr_fast("read", mixed_folder, "--format", "jsonl", "--batch-size", "2")
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == sorted(str(path) for path in mixed_folder.iterdir())
    good = {str(mixed_folder / sample.name) for sample in SAMPLES[:3]}
    for row in rows:
        if row["path"] in good:
            assert set(row) == {"path", "text", "confidence", "token_ids", "truncated"}
            assert row["text"] and 0 < row["confidence"] <= 1 and row["token_ids"][0] == 2
        else:
            assert set(row) == {"path", "error"}
            assert "expected" in row["error"]


def test_neighbours_of_bad_pictures_read_as_alone(mixed_folder: Path) -> None:
    mixed = trocr_fast("read", mixed_folder).stdout.splitlines()
    alone = [line for s in SAMPLES[:3] for line in trocr_fast("read", mixed_folder / s.name).stdout.splitlines()]
    assert mixed == alone


def test_text_output(mixed_folder: Path) -> None:
    done = trocr_fast("read", *SAMPLES[:2], mixed_folder / "empty.png")
    paths = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert paths == [str(sample) for sample in SAMPLES[:2]]  # data alone on stdout
    assert f"{mixed_folder / 'empty.png'}\terror: " in done.stderr


def test_abort_at_the_first_bad_picture(mixed_folder: Path) -> None:
    done = trocr_fast("read", mixed_folder / "empty.png", SAMPLES[0], "--on-error", "abort", "--format", "jsonl")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl", "text"])
def test_output_file(format: str, tmp_path: Path) -> None:
    out = tmp_path / f"lines.{'txt' if format == 'text' else format}"  # the ending chooses the format
    done = trocr_fast("read", *SAMPLES[:2], "-o", out)
    assert done.returncode == 0 and done.stdout == ""
    rows = out.read_text(encoding="utf-8").splitlines()
    if format == "csv":
        assert [row["path"] for row in csv.DictReader(io.StringIO(out.read_text()))] == [str(s) for s in SAMPLES[:2]]
    elif format == "jsonl":
        assert [json.loads(row)["path"] for row in rows] == [str(s) for s in SAMPLES[:2]]
    else:
        assert [row.split("\t")[0] for row in rows][-2:] == [str(s) for s in SAMPLES[:2]]

    before = out.read_bytes()
    again = trocr_fast("read", SAMPLES[2], "-o", out)
    assert again.returncode == 5 and "exists" in again.stderr
    assert out.read_bytes() == before  # nothing already done is lost
    assert trocr_fast("read", SAMPLES[2], "-o", out, "--existing", "overwrite").returncode == 0
    assert str(SAMPLES[2]) in out.read_text(encoding="utf-8")


def test_unwritable_output(tmp_path: Path) -> None:
    done = trocr_fast("read", SAMPLES[0], "-o", tmp_path / "no" / "such" / "folder.txt")
    assert done.returncode == 5
    assert "can't be written" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trocr_fast", "read", str(SAMPLES[0])]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 5
    assert "output can't be written" in done.stderr and "Traceback" not in done.stderr


def test_reader_that_has_gone() -> None:
    command = [sys.executable, "-m", "trocr_fast", "read", *map(str, SAMPLES)]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)
    finally:
        os.close(write_end)
    assert done.returncode == 5 and done.stderr == ""


def test_closed_streams() -> None:
    shell = f"exec '{sys.executable}' -m trocr_fast read '{SAMPLES[0]}' "
    for closed in (">&-", "2>&-"):
        assert subprocess.run(["sh", "-c", shell + closed], env=ENVIRONMENT, cwd=ROOT).returncode == 0


def test_over_long_line_of_a_list_is_one_error_row() -> None:
    done = trocr_fast("read", "-", "--format", "jsonl", stdin=f"{SAMPLES[0]}\n{'x' * 200_000}\n{SAMPLES[1]}\n")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert ["error" in row for row in rows] == [False, True, False]
    assert rows[2]["path"] == str(SAMPLES[1])


def test_progress_bar_on_a_terminal_leaves_rows_whole() -> None:
    main, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a bar has to have a width
    command = [sys.executable, "-m", "trocr_fast", "read", *map(str, SAMPLES[:3])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=ENVIRONMENT, cwd=ROOT)
    os.close(terminal)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    assert "line/s" in shown
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(s) for s in SAMPLES[:3]]


def test_beams_and_log_probabilities_on_request() -> None:
    from trocr_fast import TrOCR

    paths = [LINES / "address.jpg", LINES / "total.png"]
    done = trocr_fast("read", *paths, "--num-beams", "3", "--format", "jsonl", "--token-log-probs")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row, line in zip(rows, TrOCR.from_pretrained(device="cpu").read(paths, num_beams=3), strict=True):
        assert row["token_ids"] == line.token_ids
        assert len(row["token_log_probs"]) == len(line.token_ids) - 1
        mean = sum(row["token_log_probs"]) / len(row["token_log_probs"])
        assert math.exp(mean) == pytest.approx(row["confidence"], abs=1e-5)


def test_one_format_alone_in_any_spelling() -> None:
    done = trocr_fast("read", LINES / "gate.png", LINES / "hello.jpg", "--picture-format", "png", "--format", "jsonl")
    good, bad = map(json.loads, done.stdout.splitlines())
    assert good["text"] and "error" not in good
    assert "expected a whole picture in a format of PNG" in bad["error"]


def test_list_on_stdin() -> None:
    done = trocr_fast("read", "-", stdin="\n".join(map(str, SAMPLES[:2])))
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(s) for s in SAMPLES[:2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read"], "PATH"),
        (["read", "x.png", "--format", "word"], "--format"),
        (["read", "x.png", "--batch-size", "0"], "--batch-size"),
        (["read", "x.png", "--no-such-option"], "--no-such-option"),
        (["read", "no/such/*.png"], "no/such"),
        (["read", SAMPLES[0], "--model", "no_such_folder"], "no_such_folder"),
        (["read", SAMPLES[0], "--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["read", SAMPLES[0], "--model", LINES], "config.json"),
        (["read", SAMPLES[0], "--max-image-mpixels", "0"], "max_image_mpixels"),
        (["read", SAMPLES[0], "--picture-format", "DOC"], "formats"),
        (["read", SAMPLES[0], "--revision", "main"], "revision"),
        (["read", SAMPLES[0], "--num-beams", "0"], "--num-beams"),
        (["read", SAMPLES[0], "--token-log-probs"], "expected --format jsonl beside it, got text"),
        (["evaluate", ROOT / "tests" / "checkpoints"], "pictures"),
        (["evaluate", "nothing.png"], "no truth: expected nothing.gt.txt beside the pictures, or a labels.csv"),
        (["read", ""], "expected a picture, a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage(arguments: list[object], message: str) -> None:
    done = trocr_fast(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_cuda_is_told() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = trocr_fast("read", SAMPLES[0], "--device", "cuda")
    assert done.returncode == 2 and "not there" in done.stderr


def test_evaluate_prints_lines_and_rates() -> None:
    done = trocr_fast("evaluate", "--lines", LINES)
    assert done.returncode == 0
    *lines, summary = done.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(sample) for sample in SAMPLES]
    assert summary.startswith("CER ") and f"of {len(SAMPLES)} lines" in summary


def test_evaluate_without_truth(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SAMPLES[0].read_bytes())
    done = trocr_fast("evaluate", tmp_path)
    assert done.returncode == 2 and "a.gt.txt" in done.stderr


def test_verify_agrees_on_the_samples() -> None:
    for kind in ("kv", "latent"):
        done = trocr_fast("verify", LINES, "--cross-memory", kind)
        assert done.returncode == 0, done.stdout
        assert f"{len(SAMPLES)} of {len(SAMPLES)} rows equal" in done.stdout


def test_info() -> None:
    done = trocr_fast("info")
    assert done.returncode == 0
    assert "vit encoder" in done.stdout and "MB a line" in done.stdout


def test_reading_imports_neither_transformers_nor_torchvision() -> None:
    script = (
        "import sys, runpy\n"
        "sys.argv = ['trocr-fast', 'read', sys.argv[1]]\n"
        "try: runpy.run_module('trocr_fast', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'transformers', 'torchvision', 'triton', 'jiwer', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, SAMPLES[0]], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom trocr_fast.cli import main\nsys.argv = ['trocr-fast', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "read" in done.stdout and "verify" in done.stdout


def test_interrupt() -> None:
    # A list on a pipe that never ends keeps the command waiting for more pictures; the first row says it has begun.
    command = [sys.executable, "-m", "trocr_fast", "read", "-", "--batch-size", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed_interrupts() -> None:  # a shell's background jobs ignore them, and so would their children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, **pipes, env=ENVIRONMENT, cwd=ROOT, preexec_fn=heed_interrupts) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{SAMPLES[0]}\n".encode() * 100)
            process.stdin.flush()
            assert process.stdout.readline().startswith(str(SAMPLES[0]).encode())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
