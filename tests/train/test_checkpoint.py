import dataclasses
import errno
import json
import os

import pytest
import torch

from fastgpt import json_files
from fastgpt.errors import RequestError
from fastgpt.model import GPTConfig
from fastgpt.train import checkpoint

RUN_STATE = checkpoint.State(
    step=3,
    best_val_loss=1 / 3,
    best_step=2,
    tokens=12345,
    loader={"epoch": 1, "visited": 70},
    model=GPTConfig(n_layer=2),
)


def state(step, best_step=None):
    return dataclasses.replace(RUN_STATE, step=step, best_step=best_step)


def tensors(seed=0):
    """Parameters and moments that share one buffer, as a ParameterStore's do."""
    flat = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    parameters, first, second = ({"a": row[:4].view(2, 2), "b.weight": row[4:]} for row in flat)
    return parameters, {"exp_avg": first, "exp_avg_sq": second}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    parameters, moments = tensors()
    parameters["a"][0, 0] = -0.0
    parameters["a"][0, 1] = torch.finfo(torch.float32).smallest_normal / 4
    path = checkpoint.save(tmp_path, RUN_STATE, parameters, moments)
    assert path == checkpoint.folder(tmp_path, 3) == tmp_path / "checkpoints" / "step-0000003"
    assert checkpoint.load_state(path) == RUN_STATE
    assert_equal(checkpoint.load_parameters(path), parameters)
    assert torch.signbit(checkpoint.load_parameters(path)["a"][0, 0])
    loaded = checkpoint.load_moments(path)
    assert loaded.keys() == moments.keys()
    for kind in moments:
        assert_equal(loaded[kind], moments[kind])


def test_the_files_are_those_that_are_documented(tmp_path):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
    }  # fmt: skip


def test_torchs_random_sequence_goes_on_where_it_stood(tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    expected = torch.rand(4)
    torch.manual_seed(6)
    checkpoint.set_random_state(checkpoint.load_random_state(path))
    assert torch.equal(torch.rand(4), expected)


def test_saving_leaves_the_tensors_where_they_are(tmp_path):
    parameters, moments = tensors()
    addresses = [tensor.data_ptr() for tensor in parameters.values()]
    checkpoint.save(tmp_path, RUN_STATE, parameters, moments)
    assert [tensor.data_ptr() for tensor in parameters.values()] == addresses
    assert_equal(parameters, tensors()[0])


def test_links_show_the_newest_and_the_best(tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2)):
        checkpoint.save(tmp_path, state(step, best), *tensors())
    links = {name: os.readlink(tmp_path / "checkpoints" / name) for name in ("latest", "best")}
    assert links == {"latest": "step-0000003", "best": "step-0000002"}
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_file_system_without_links_has_checkpoints_too(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(checkpoint.Path, "symlink_to", refused)
    checkpoint.save(tmp_path, state(1, 1), *tensors())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_what_dead_processes_left_of_other_steps_is_removed(tmp_path):
    checkpoint.save(tmp_path, state(1, 1), *tensors())
    (tmp_path / "checkpoints" / "step-0000009.partial").mkdir()
    checkpoint.save(tmp_path, state(2, 2), *tensors())
    assert not (tmp_path / "checkpoints" / "step-0000009.partial").exists()


def test_only_the_best_earlier_checkpoint_is_kept(tmp_path):
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        checkpoint.save(tmp_path, state(step, best), *tensors())
    assert checkpoint.steps(tmp_path) == [2, 4]
    checkpoint.save(tmp_path, state(5, 5), *tensors())
    assert checkpoint.steps(tmp_path) == [5]


@pytest.mark.parametrize(("keep", "left"), [(1, [2, 6]), (2, [2, 5, 6]), (3, [2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_as_many_of_the_newest_as_are_asked_for_are_kept_besides_the_best(tmp_path, keep, left):
    for step in range(1, 7):
        checkpoint.save(tmp_path, state(step, min(step, 2)), *tensors(), keep)
    assert checkpoint.steps(tmp_path) == left


def test_a_later_checkpoint_than_the_one_that_was_resumed_is_removed(tmp_path):
    for step in (1, 2, 8):
        checkpoint.save(tmp_path, state(step, 1), *tensors(), 2)
    checkpoint.save(tmp_path, state(3, 1), *tensors(), 2)  # that of step 8 was damaged
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_a_disk_that_has_room_only_without_the_surplus_gets_it(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step, 1), *tensors(), 3)
    write = checkpoint.save_file

    def full(content, path, **options):
        if len(checkpoint.steps(tmp_path)) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    checkpoint.save(tmp_path, state(4, 1), *tensors(), 3)
    assert checkpoint.steps(tmp_path) == [1, 3, 4]


@pytest.mark.parametrize(("number", "saved"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.EINVAL, True)])
def test_what_the_disk_says_when_it_is_to_write_now_counts(tmp_path, monkeypatch, number, saved):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    checkpoint.save(tmp_path, state(1), *tensors())
    monkeypatch.setattr(os, "fsync", fsync)
    if saved:  # a file system without it
        checkpoint.save(tmp_path, state(2), *tensors())
    else:
        with pytest.raises(checkpoint.NotSaved, match=os.strerror(number)):
            checkpoint.save(tmp_path, state(2), *tensors())
    assert checkpoint.steps(tmp_path) == [2 if saved else 1]


def fill_disk(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)


def test_a_full_disk_costs_neither_the_best_checkpoint_nor_the_newest_good_one(tmp_path, monkeypatch):
    for step in (2, 4, 6, 8):
        checkpoint.save(tmp_path, state(step, 2), *tensors(), None)
    fill_disk(monkeypatch)
    with pytest.raises(checkpoint.NotSaved):  # it would be the best, and 8 is damaged: the run was resumed from 6
        checkpoint.save(tmp_path, state(7, 7), *tensors(), 2, best_before=2)
    assert checkpoint.steps(tmp_path) == [2, 6]


def test_a_disk_that_becomes_read_only_is_a_checkpoint_that_is_not_saved(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), *tensors())

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint, "recover", refused)
    with pytest.raises(checkpoint.NotSaved, match="Read-only"):
        checkpoint.save(tmp_path, state(2), *tensors())


def test_half_of_a_checkpoint_that_is_being_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """If the process dies while it removes one, after the manifest."""
    checkpoint.save(tmp_path, state(1), *tensors())

    def killed(path, **_):
        (path / checkpoint.MANIFEST).unlink(missing_ok=True)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    checkpoint.save(tmp_path, state(2), *tensors())
    assert checkpoint.steps(tmp_path) == [2]


def test_links_never_point_to_what_is_removed(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1, 1), *tensors())
    links = {}

    def killed(path, **_):
        links[path.name] = [(tmp_path / "checkpoints" / name).resolve().name for name in ("latest", "best")]

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    checkpoint.save(tmp_path, state(2, 2), *tensors())
    assert links["step-0000001.partial"] == ["step-0000002", "step-0000002"]


def test_a_folder_in_the_place_of_a_link_makes_room_for_it(tmp_path):
    """As ``cp -rL`` leaves it."""
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest" / "state.json").touch()
    checkpoint.save(tmp_path, state(1, 1), *tensors())
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step-0000001"


def test_a_step_that_cannot_be_saved_again_keeps_its_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1), *tensors(seed=0))
    rename = checkpoint.Path.rename

    def second_fails(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(checkpoint.Path, "rename", second_fails)
    with pytest.raises(checkpoint.NotSaved):
        checkpoint.save(tmp_path, state(1), *tensors(seed=1))
    assert_equal(checkpoint.load_parameters(checkpoint.newest(tmp_path)), tensors(seed=0)[0])


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    for step in (9, 10, 10_000_000):
        checkpoint.save(tmp_path, state(step, 9), *tensors())
    assert checkpoint.newest(tmp_path) == checkpoint.folder(tmp_path, 10_000_000)
    assert checkpoint.newest(tmp_path).is_dir()


def test_a_step_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, state(1), *tensors(seed=0))
    path = checkpoint.save(tmp_path, state(1), *tensors(seed=1))
    assert_equal(checkpoint.load_parameters(path), tensors(seed=1)[0])
    assert checkpoint.steps(tmp_path) == [1]


@pytest.mark.parametrize("fails_at", ["model.safetensors", "optimizer.safetensors", "rename"])
def test_a_checkpoint_that_was_not_finished_is_never_seen(tmp_path, monkeypatch, fails_at):
    checkpoint.save(tmp_path, state(1), *tensors(seed=0))
    write = checkpoint.save_file

    def half_a_file(content, path, **options):
        write(content, path, **options)
        if path.name == fails_at:
            path.write_bytes(path.read_bytes()[:20])
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if fails_at == "rename":
            patch.setattr(checkpoint.Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        else:
            patch.setattr(checkpoint, "save_file", half_a_file)
        with pytest.raises(OSError, match=r"no space|power cut"):
            checkpoint.save(tmp_path, state(2), *tensors(seed=1))
    assert checkpoint.steps(tmp_path) == [1]
    assert_equal(checkpoint.load_parameters(checkpoint.newest(tmp_path)), tensors(seed=0)[0])
    path = checkpoint.save(tmp_path, state(2), *tensors(seed=1))  # the remains are in nobody's way
    assert_equal(checkpoint.load_parameters(path), tensors(seed=1)[0])
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {"step-0000002", "latest"}


def test_other_folders_among_the_checkpoints_are_no_checkpoints(tmp_path):
    checkpoint.save(tmp_path, state(1), *tensors())
    for name in ("step-0000009.partial", "step-best", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_run_without_a_checkpoint_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="holds no checkpoint; train a run with --out_dir"):
        checkpoint.newest(tmp_path)


def test_a_state_that_names_no_bits_is_of_moments_of_32(tmp_path):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    content = json.loads((path / "state.json").read_text())
    del content["state_bits"], content["optimizer_seeds"], content[json_files.CHECKSUM]
    (path / "state.json").write_text(json.dumps(content))
    assert checkpoint.load_state(path) == RUN_STATE
    assert RUN_STATE.state_bits == 32


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"step": 1, "unheard_of": 2}', None])
def test_a_damaged_state_is_a_wrong_request_that_names_the_file(tmp_path, content):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    (path / "state.json").unlink() if content is None else (path / "state.json").write_text(content)
    with pytest.raises(RequestError, match=r"state\.json(: | is damaged: | cannot be read: )"):
        checkpoint.load_state(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, r"step: expected an integer of 64 bits, got '3'"),
        ({"step": 1e30}, r"step: expected an integer of 64 bits, got 1e\+30"),
        ({"step": 10**30}, r"step: expected an integer of 64 bits"),
        ({"step": True}, r"step: expected an integer of 64 bits, got True"),
        ({"step": -3}, r"step -3, tokens 12345, skipped 0 are not those of a run"),
        ({"best_val_loss": "low"}, r"best_val_loss: expected a finite number or null, got 'low'"),
        ({"loader": [1, 2]}, r"loader: expected a table, got \[1, 2\]"),
        ({"loader": {"epoch": 0.5}}, r"loader: epoch: expected an integer of 64 bits, got 0.5"),
        ({"model": {}}, r"model: 'block_size' is missing"),
        ({"optimizer": "lion"}, r"optimizer: expected 'adamw' or 'muon', got 'lion'"),
        ({"optimizer_seeds": {}}, r"optimizer_seeds: expected a list, got \{\}"),
        ({"stepp": 3}, r"unknown entry 'stepp'; did you mean step\?"),
    ],
)
def test_an_entry_of_another_type_or_range_is_named(tmp_path, change, message):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    content = json_files.read(path / "state.json")
    json_files.write(path / "state.json", content | change)
    with pytest.raises(RequestError, match=r"state\.json: " + message):
        checkpoint.load_state(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a"), "a is missing"),
        (lambda t: t.update(c=torch.ones(2)), "c is unknown"),
        (lambda t: t.update(a=t["a"].half()), r"expected a of torch.float32, \(2, 2\), got torch.float16, \(2, 2\)"),
        (lambda t: t.update(a=t["a"].int()), r"expected a of torch.float32, \(2, 2\), got torch.int32, \(2, 2\)"),
        (lambda t: t.update(a=t["a"][:1, :1]), r"expected a of torch.float32, \(2, 2\), got torch.float32, \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_other_tensors_than_those_expected_are_named(tmp_path, which, change, message):
    parameters, moments = tensors()
    changed = {name: t.clone() for name, t in (parameters if which == "model" else moments["exp_avg"]).items()}
    change(changed)
    if which == "model":
        path = checkpoint.save(tmp_path, RUN_STATE, changed, moments)
    else:
        path = checkpoint.save(tmp_path, RUN_STATE, parameters, moments | {"exp_avg": changed})
        message = message.replace("expected a", r"expected exp_avg\.a")
    load = checkpoint.load_parameters if which == "model" else checkpoint.load_moments
    with pytest.raises(RequestError, match=rf"{which}\.safetensors: .*{message}"):
        load(path, parameters if which == "model" else moments)


def test_a_kind_of_moments_that_is_missing_is_named(tmp_path):
    parameters, moments = tensors()
    path = checkpoint.save(tmp_path, RUN_STATE, parameters, {"exp_avg": moments["exp_avg"]})
    with pytest.raises(RequestError, match=r"optimizer\.safetensors: exp_avg_sq\.a is missing"):
        checkpoint.load_moments(path, moments)


@pytest.mark.parametrize("state", [{}, {"rng_state.cpu": torch.zeros(7, dtype=torch.uint8)}])
def test_a_random_state_that_is_none_is_a_wrong_request(state):
    with pytest.raises(RequestError, match="random state cannot be used"):
        checkpoint.set_random_state(state)


@pytest.mark.parametrize("name", ["model", "optimizer"])
@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-8]), lambda file: file.unlink()])
def test_damaged_tensors_are_a_wrong_request_that_names_the_file(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    damage(path / f"{name}.safetensors")
    load = checkpoint.load_parameters if name == "model" else checkpoint.load_moments
    with pytest.raises(RequestError, match=rf"{name}\.safetensors cannot be read"):
        load(path)


def test_the_state_is_json_that_others_can_read(tmp_path):
    path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    content = json.loads((path / "state.json").read_text())
    del content[json_files.CHECKSUM]
    assert content == dataclasses.asdict(RUN_STATE)


# ---- damage ----


def damaged(path, name, how):
    """Damage a file of a checkpoint; ``how`` is ``flip``, ``truncate``, ``zero`` or ``remove``."""
    file = path / name
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if how == "remove":
        file.unlink()
        return
    if how == "flip":
        content[middle] ^= 1
    elif how == "truncate":
        del content[middle:]
    else:
        content[: len(content)] = bytes(len(content))
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "remove"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, name, how):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step, 1), *tensors(seed=step))
    path = checkpoint.newest(tmp_path)
    checkpoint.verify(path)
    damaged(path, name, how)
    if (name, how) == ("manifest.json", "remove"):  # as in checkpoints from before there were manifests
        checkpoint.verify(path)
        return
    with pytest.raises(RequestError, match=rf"step-0000002/{name} (is damaged|cannot be read)|manifest.json"):
        checkpoint.verify(path)
    found, problems = checkpoint.newest_good(tmp_path)
    assert found == checkpoint.folder(tmp_path, 1)
    assert len(problems) == 1
    damaged(found, "model.safetensors", "flip")
    with pytest.raises(RequestError, match="no checkpoint that can be used"):
        checkpoint.newest_good(tmp_path)


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        path = checkpoint.save(tmp_path, RUN_STATE, *tensors())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_a_checkpoint_that_lost_its_name_in_a_crash_gets_it_back(tmp_path):
    path = checkpoint.save(tmp_path, state(1), *tensors())
    path.rename(path.with_name(path.name + ".old"))
    assert checkpoint.steps(tmp_path) == []
    checkpoint.recover(tmp_path)
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.verify(path)
