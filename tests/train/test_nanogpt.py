import pytest

from fastgpt.errors import RequestError
from fastgpt.train import nanogpt


def read(tmp_path, text):
    (tmp_path / "config.py").write_text(text)
    return nanogpt.read(tmp_path / "config.py")


def test_plain_values_and_arithmetic_are_read(tmp_path):
    text = '''"""What this is for."""
# a comment
import time
from os import path
out_dir = 'out-shakespeare'
learning_rate = 1e-3
gradient_accumulation_steps = 5 * 8
compile = False  # a reason
batch_size = 12
max_iters = (batch_size + 3) * 1000 // 2
min_lr = learning_rate / 10
shift = -2.5
nothing = None
"a text alone"
'''
    assert read(tmp_path, text) == {
        "out_dir": "out-shakespeare", "learning_rate": 1e-3, "gradient_accumulation_steps": 40, "compile": False,
        "batch_size": 12, "max_iters": 7500, "min_lr": 1e-4, "shift": -2.5, "nothing": None,
    }  # fmt: skip


def test_a_runs_name_may_be_anything(tmp_path):
    text = "import time\nwandb_run_name = 'ft-' + str(time.time())\nbatch_size = 1\n"
    assert read(tmp_path, text) == {"batch_size": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_size = open('x')", r"line 2: batch_size is not a plain value"),
        ("batch_size = __import__('os').system('touch harm')", r"not a plain value"),
        ("batch_size = unknown", r"'unknown' is neither"),
        ("batch_size = 1 / 0", r"division by zero"),
        ("batch_size = 10 ** 10", r"neither a value nor arithmetic"),
        ("batch_size = 'a' * 1000000", r"is not a number"),
        ("batch_size = 999999999999 * 999999999999", r"is not a number that a flag can have"),
        ("batch_size, b = 1, 2", r"only lines like 'name = value' are read"),
        ("for i in range(3): pass", r"only lines like"),
        ("print('hello')", r"only lines like"),
        ("batch_size =", r"is not a config file"),
        ("batch_size = b'x'", r"neither a value"),
        ("batch_size = " + "(" * 500 + "1" + ")" * 500, r"is not a config file"),
        ("batch_size = " + "-" * 100_000 + "1", r"is not a config file|not a plain value"),
    ],
)
def test_nothing_else_is_read_nor_run(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=message):
        read(tmp_path, f"x = 1\n{line}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"none\.py cannot be read: No such file"):
        nanogpt.read(tmp_path / "none.py")
