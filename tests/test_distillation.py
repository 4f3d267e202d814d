"""Distillation at scale: what each variant trains, frozen blocks computed once, several processes,
shards, interruptions, full disks."""
import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import distill
import extract_teacher
from common import RunFailed, WrongCall, read_index, read_json_lines, start_runtime
from test_stages import SMALL, files, run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(micro, photos, tmp_path_factory):
    """20 maps of stride 24."""
    out = tmp_path_factory.mktemp("distillation") / "teacher"
    run(extract_teacher, "--images", photos, "--out", out, "--backbone", micro, *SMALL)
    return out


@pytest.fixture(scope="module")
def whole(teacher):
    """A student of 4 epochs, trained without an interruption, whose frozen tokens are kept in a
    folder beside it."""
    out = teacher.parent / "whole"
    run(distill, "--teacher", teacher, "--out", out, *RECIPE,
        "--cache-frozen", teacher.parent / "tokens")
    return out


RECIPE = ["--epochs", "4", "--lr", "1e-3", "--save-every", "7"]


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def losses(folder):
    return [(entry["step"], entry["epoch"], entry["loss"], entry["lr"])
            for entry in read_json_lines(folder / "log.jsonl")]


def assert_same_training(one, other):
    assert losses(one) == losses(other)
    assert ((one / "open_clip_model.safetensors").read_bytes()
            == (other / "open_clip_model.safetensors").read_bytes())


# ---- variants ------------------------------------------------------------------------------------

def towers():
    """Small towers of the families, as timm names their parameters: as SigLIP2's, EVA02-CLIP's and
    DINOv3's."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2,
            "num_classes": 0}
    siglip = VisionTransformer(**size, global_pool="map", class_token=False)
    eva = Eva(**size, qkv_fused=False, swiglu_mlp=True, use_rot_pos_emb=True)
    rotary = Eva(**size, qkv_fused=True, use_abs_pos_emb=False, use_rot_pos_emb=True)
    return {"siglip": siglip, "eva": eva, "rotary": rotary}


EXPECTED = {  # of the last block, and of the tower
    ("siglip", "qkv"): {"attn.qkv.weight", "attn.qkv.bias"},
    ("siglip", "mlp"): {f"mlp.fc{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")},
    ("siglip", "pos-embed"): {"pos_embed"},
    ("siglip", "patch-embed"): {"patch_embed.proj.weight", "patch_embed.proj.bias"},
    ("eva", "qkv"): {"attn.q_proj.weight", "attn.q_proj.bias", "attn.k_proj.weight",
                     "attn.v_proj.weight", "attn.v_proj.bias"},
    ("eva", "mlp"): {f"mlp.{part}.{kind}"
                     for part in ("fc1", "fc2") for kind in ("weight", "bias")},
    ("eva", "pos-embed"): {"pos_embed"},
    ("rotary", "qkv"): {"attn.qkv.weight", "attn.q_bias", "attn.v_bias"},
    ("rotary", "patch-embed"): {"patch_embed.proj.weight", "patch_embed.proj.bias"},
}


@pytest.mark.parametrize("family, only", EXPECTED)
def test_parts_of_timm_towers(family, only):
    trunk = towers()[family].requires_grad_(False)
    student = SimpleNamespace(blocks=trunk.blocks, visual=torch.nn.ModuleDict({"trunk": trunk}))
    first, parameters = distill.select_trained(
        student, "1" if only in ("qkv", "mlp") else None, only)
    prefix = "blocks.2." if only in ("qkv", "mlp") else ""
    assert ({name for name, parameter in trunk.named_parameters() if parameter.requires_grad}
            == {prefix + name for name in EXPECTED[family, only]})
    assert len(parameters) == len(EXPECTED[family, only]) and first == (2 if prefix else None)


def test_a_part_that_is_not_there_is_refused():
    trunk = towers()["rotary"]
    with pytest.raises(WrongCall, match="pos-embed.*nothing would be trained.*not learned"):
        distill.select_trained(SimpleNamespace(blocks=trunk.blocks, visual=trunk), None,
                               "pos-embed")


@pytest.mark.parametrize("flags, changed", [
    (["--train-only", "qkv"],
     {f"transformer.resblocks.{k}.attn.in_proj_{kind}"
      for k in (1, 2) for kind in ("weight", "bias")}),
    (["--train-only", "mlp", "--train-blocks", 1],
     {f"transformer.resblocks.2.mlp.{part}.{kind}"
      for part in ("c_fc", "c_proj") for kind in ("weight", "bias")}),
    (["--train-only", "patch-embed"], {"conv1.weight"}),
    (["--train-only", "pos-embed"], {"positional_embedding"}),
])
def test_train_only(teacher, micro, tmp_path, flags, changed):
    run(distill, "--teacher", teacher, "--out", tmp_path, "--epochs", 1, "--lr", 1e-3, *flags)
    before, after = weights(Path(micro.removeprefix("local-dir:"))), weights(tmp_path)
    assert ({key for key in before if not torch.equal(before[key], after[key])}
            == {f"visual.{name}" for name in changed})


def test_the_optimizer_is_the_papers(backbone):
    student = copy.deepcopy(backbone)
    trained = distill.select_trained(student, "2")
    adamw = distill.Trainer(student, trained, distill.Recipe(), start_runtime("cpu")).optimizer
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["params"] == trained[1]
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (2e-5, 1e-4)


def test_similarity_loss(teacher, backbone, tmp_path):
    rng = torch.Generator().manual_seed(0)
    features, target, texts = (torch.randn(*shape, generator=rng)
                               for shape in ((3, 5, 24), (3, 5, 24), (7, 24)))
    naive = sum((F.cosine_similarity(features[i, j], texts[n], dim=0)
                 - F.cosine_similarity(target[i, j], texts[n], dim=0)) ** 2
                for i in range(3) for j in range(5) for n in range(7)) / 105
    loss = distill.distillation_loss(features, target, "similarity",
                                     F.normalize(texts, dim=-1))
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    (tmp_path / "classes.txt").write_text("cat\ngrass, lawn\nsky\n")
    run(distill, "--teacher", teacher, "--out", tmp_path / "spar", "--epochs", 3, "--lr", 1e-3,
        "--loss", "similarity", "--classes", tmp_path / "classes.txt")
    mean = [np.mean([loss for _, epoch, loss, _ in losses(tmp_path / "spar") if epoch == k])
            for k in (0, 2)]
    assert mean[1] < 0.9 * mean[0]


def test_multi_resolution_distillation(micro, photos, tmp_path):
    """Every image is rescaled anew in each epoch, and maps are compared on the teacher's grid."""
    run(extract_teacher, "--images", photos, "--out", tmp_path / "single", "--backbone", micro,
        *SMALL, "--stride", 0)
    flags = ["--teacher", tmp_path / "single", "--epochs", 2, "--lr", 1e-3,
             "--random-scale", 0.5, 2]
    run(distill, "--out", tmp_path / "a", *flags)
    run(distill, "--out", tmp_path / "b", *flags)
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "single").glob("frozen*"))
    factors = np.array([[distill.random_factor((0.5, 2), 0, epoch, index) for index in range(500)]
                        for epoch in range(2)])
    assert factors.min() < 0.55 and factors.max() > 1.9 and not np.any(factors[0] == factors[1])
    features, target = torch.randn(6, 2, 24), torch.randn(3, 5, 24)
    resized = torch.stack([F.interpolate(features[None, :, :, c][None], size=(3, 5),
                                         mode="bilinear")[0, 0] for c in range(24)], -1)
    assert (distill.distillation_loss(features, target).item()
            == pytest.approx(((resized - target) ** 2).mean().item(), rel=1e-5))


@pytest.mark.parametrize("flags, message", [
    (["--train-blocks", 4], "from 1 to 3"),
    (["--train-only", "pos-embed", "--train-blocks", 2], "leave --train-blocks out"),
    (["--loss", "similarity"], "--classes"),
    (["--classes", "cat, dog"], "--loss similarity"),
    (["--random-scale", 2, 1], "LO <= HI"),
    (["--batch-size", 0], "--batch-size 0"),
    (["--weight-decay", -1], "at least 0"),
    (["--train-only", "patch-embed", "--cache-frozen", "kept"], "no block is frozen"),
    (["--random-scale", 1, 2, "--cache-frozen", "kept"], "every epoch"),
])
def test_wrong_calls_of_distill(teacher, tmp_path, flags, message):
    with pytest.raises(WrongCall, match=message):
        run(distill, "--teacher", teacher, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# ---- frozen blocks, computed once ----------------------------------------------------------------

def test_kept_tokens_change_nothing_but_their_rounding(whole, teacher, micro, tmp_path):
    """float16 keeps 11 bits: the first loss is the same to 1e-4 of itself, all 80 to 1e-3, and the
    weights to 2 % of the way they moved."""
    run(distill, "--teacher", teacher, "--out", tmp_path, *RECIPE, "--cache-frozen", "off")
    kept, computed = (np.array([loss for _, _, loss, _ in losses(folder)])
                      for folder in (whole, tmp_path))
    difference = np.abs(kept / computed - 1)
    assert len(kept) == 80 and 0 < difference[0] < 1e-4 and difference.max() < 1e-3
    start, kept, computed = (weights(Path(micro.removeprefix("local-dir:"))), weights(whole),
                             weights(tmp_path))
    moved = sum((computed[key] - start[key]).square().sum() for key in start).sqrt()
    apart = sum((computed[key] - kept[key]).square().sum() for key in start).sqrt()
    print(f"losses differ by {difference[0]:.1e} of themselves at first and "
          f"{difference.max():.1e} at most; "
          f"weights moved {moved:.3f} and are {apart:.1e} apart")
    assert 0 < apart < 0.02 * moved


def test_later_epochs_and_runs_read_the_tokens_instead_of_pictures(whole, teacher, tmp_path,
                                                                   monkeypatch):
    tokens = teacher.parent / "tokens"
    assert len(list(tokens.rglob("*.npy"))) == 20 and not list(tokens.rglob(".tmp*"))
    decoded = []
    monkeypatch.setattr(distill, "read_image",
                        lambda path: decoded.append(path) or common.read_image(path))
    run(distill, "--teacher", teacher, "--out", tmp_path / "found", *RECIPE,
        "--cache-frozen", tokens)
    assert len(decoded) == 1  # to learn how many tokens there are
    assert_same_training(whole, tmp_path / "found")
    run(distill, "--teacher", teacher, "--out", tmp_path / "made", *RECIPE,
        "--cache-frozen", tmp_path / "tokens")
    assert len(decoded) == 1 + 1 + 20
    assert_same_training(whole, tmp_path / "made")
    (damaged,) = tokens.rglob("8.png.npy")
    damaged.write_bytes(damaged.read_bytes()[:-7])  # made anew
    run(distill, "--teacher", teacher, "--out", tmp_path / "mended", *RECIPE,
        "--cache-frozen", tokens)
    assert_same_training(whole, tmp_path / "mended")


def test_tokens_of_other_settings_are_refused(whole, teacher, tmp_path):
    with pytest.raises(WrongCall, match="first_block was 1 and is now 2.*--cache-frozen"):
        run(distill, "--teacher", teacher, "--out", tmp_path, "--train-blocks", 1,
            "--cache-frozen", teacher.parent / "tokens")
    with pytest.raises(WrongCall, match="cache_frozen was True and is now False"):
        run(distill, "--teacher", teacher, "--out", whole, *RECIPE, "--cache-frozen", "off")


def test_tokens_beyond_float16(tmp_path):
    frozen = distill.FrozenTokens(tmp_path, {}, [], 1, 4)
    entry = {"file": "features/a.png.npy", "image": "a.png", "grid": [2, 2]}
    kept = frozen.keep(entry, torch.full((1, 5, 4), 60000.0))
    frozen.wait()
    assert (torch.equal(frozen.read(entry)[None], kept)
            and frozen.path(entry).stat().st_size == frozen.bytes(entry))
    with pytest.raises(RunFailed, match="a.png are beyond 65504.*--cache-frozen off"):
        frozen.keep(entry, torch.full((1, 5, 4), 70000.0))
        frozen.wait()


def test_frozen_blocks_keep_no_gradients(backbone):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    assert not distill.frozen_tokens(backbone, image, 2).requires_grad
    assert torch.equal(
        backbone.project(
            backbone.run_blocks(distill.frozen_tokens(backbone, image, 2), (4, 6), start=2),
            (4, 6)),
        backbone.encode_dense(backbone.normalise(image)[None]))


def test_a_disk_that_is_too_small_is_noticed_before(micro, photos, teacher, tmp_path, monkeypatch,
                                                    capsys):
    frozen = distill.FrozenTokens(tmp_path / "tokens", {}, read_index(teacher), 1, 32)
    size = sum(map(frozen.bytes, frozen.entries))
    monkeypatch.setattr(distill, "free_bytes", lambda folder: size)
    assert frozen.decide(must=False, earlier=None, epochs=10) is False  # auto does without
    assert "would need" in capsys.readouterr().out
    monkeypatch.setattr(common, "free_bytes", lambda folder: 1000)
    with pytest.raises(RunFailed, match="frozen tokens.* need .* GB free"):
        run(distill, "--teacher", teacher, "--out", tmp_path / "spar",
            "--cache-frozen", tmp_path / "tokens")
    with pytest.raises(RunFailed, match="missing feature maps need .* GB free"):
        run(extract_teacher, "--images", photos, "--out", tmp_path / "teacher",
            "--backbone", micro, *SMALL)
    assert not (tmp_path / "teacher" / "features").exists() and not (tmp_path / "spar").exists()


def test_features_take_what_was_estimated(teacher, photos, backbone):
    settings = json.loads((teacher / "teacher.json").read_text())
    jobs = [(entry["image"], entry["version"]) for entry in read_index(teacher)]
    augmentation = extract_teacher.Augmentation(**settings["augment"])
    pictures = extract_teacher.Pictures(photos, augmentation, 16, 0)
    estimate = pictures.estimate_bytes(jobs, backbone.dim)
    assert estimate == sum(path.stat().st_size for path in (teacher / "features").rglob("*.npy"))


# ---- several processes, interruptions ------------------------------------------------------------

# Imports once and forks what is asked for, so that ten interruptions take seconds; the command
# lines themselves run in test_stages.py.
SERVER = """
import json, os, signal, sys, time
import matplotlib.pyplot, open_clip, timm, torch
import common, distill, extract_teacher
print("ready", flush=True)
for line in sys.stdin:
    job, pids = json.loads(line), []
    for rank in range(job["world"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            output = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.argv = [job["stage"] + ".py", *job["flags"]]
            if job["world"] > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                                  WORLD_SIZE=str(job["world"]),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
            stage = sys.modules[job["stage"]]
            try:
                common.command_line(stage.main, stage.parse_args(job["flags"]))
            except SystemExit as leaving:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(leaving.code)
    if job["signal"]:
        def lines():
            return open(job["lines"]).read().count("\\n") if os.path.exists(job["lines"]) else 0
        while (os.waitid(os.P_PID, pids[-1], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
               and lines() < job["count"]):
            time.sleep(0.002)
        time.sleep(job["after"])
        os.kill(pids[-1], job["signal"])
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]),
          flush=True)
"""


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(stage, flags, world=, number=, after=, lines=, count=): run a stage in new processes;
    send a signal to the last of them some seconds after so many lines are in a file. Returns the
    exit codes and the processes' outputs."""
    log = tmp_path_factory.mktemp("forks") / "output"
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})

    assert server.stdout.readline() == "ready\n"

    def fork(stage, flags, world=1, number=0, after=0.0, lines=None, count=3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"stage": stage, "flags": [str(flag) for flag in flags], "world": world,
               "signal": number, "after": after, "lines": str(lines) if lines else None,
               "count": count, "log": str(log), "port": port}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, [Path(f"{log}.{rank}").read_text() for rank in range(world)]

    yield fork
    server.stdin.close()
    server.wait(timeout=60)


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(fork, whole, teacher, tmp_path):
    """SIGKILL and the same command again: the weights and the log of the uninterrupted run, bit for
    bit. Tokens are kept meanwhile."""
    flags = ["--teacher", teacher, "--out", tmp_path / "spar", *RECIPE,
             "--cache-frozen", tmp_path / "tokens"]
    rng, log, reached = random.Random(0), tmp_path / "spar" / "log.jsonl", []
    for _ in range(10):
        # at once, if the process before got there
        count = (reached[-1] if reached else 0) + rng.randrange(-2, 12)
        fork("distill", flags, number=signal.SIGKILL, after=rng.uniform(0, 0.03), lines=log,
             count=count)
        reached.append(len(read_json_lines(log)))
    codes, (output,) = fork("distill", flags)
    assert codes == [0], output
    print(f"steps done at the ten kills: {reached}")
    assert_same_training(whole, tmp_path / "spar")


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_continue(fork, whole, teacher, tmp_path):
    flags = ["--teacher", teacher, "--out", tmp_path, *RECIPE[:-1], "1000",
             "--cache-frozen", teacher.parent / "tokens"]
    codes, (output,) = fork("distill", flags, number=signal.SIGTERM, lines=tmp_path / "log.jsonl")
    done = len(losses(tmp_path))
    assert (codes == [130] and f"stopped and saved after step {done} of 80" in output
            and 3 <= done < 80)
    assert output.strip().splitlines()[-1].startswith(
        "error: interrupted; continue with: "
        f"python distill.py --teacher {teacher} --out {tmp_path}")
    assert (torch.load(tmp_path / "training_state.pt", weights_only=True)["step"] == done
            and (tmp_path / "loss.png").exists())
    codes, (output,) = fork("distill", flags)
    assert codes == [0] and f"continuing after step {done}" in output
    assert_same_training(whole, tmp_path)


def test_a_damaged_state_is_named(teacher, whole, tmp_path):
    flags = ["--teacher", teacher, "--out", tmp_path, *RECIPE,
             "--cache-frozen", teacher.parent / "tokens"]
    run(distill, *flags)
    (tmp_path / "training_state.pt").write_bytes(b"cut short")
    with pytest.raises(RunFailed, match="training_state.pt cannot be read.*delete it"):
        run(distill, *flags)
    (tmp_path / "training_state.pt").unlink()
    run(distill, *flags)
    assert_same_training(whole, tmp_path)


def test_losses_may_be_read_late(teacher, whole, tmp_path, monkeypatch):
    """As on a GPU, which is not waited for at every step: the same log, weights and states."""
    init = distill.Log.__init__

    def late(log, *args):
        init(log, *args)
        log.every = 20
    monkeypatch.setattr(distill.Log, "__init__", late)
    written = []
    append = distill.append_json_lines
    monkeypatch.setattr(distill, "append_json_lines", lambda path, *entries:
                        written.append(len(entries)) or append(path, *entries))
    run(distill, "--teacher", teacher, "--out", tmp_path, *RECIPE,
        "--cache-frozen", teacher.parent / "tokens")
    assert max(written) == 7 and sum(written) == 80  # every state is preceded by its losses
    assert_same_training(whole, tmp_path)


def test_an_overflow_of_tokens_is_told_before_the_loss_it_spoils(teacher, tmp_path, monkeypatch):
    tokens = distill.frozen_tokens
    monkeypatch.setattr(distill, "frozen_tokens", lambda *args: 1e6 * tokens(*args))
    with pytest.raises(RunFailed, match="png are beyond 65504.*--cache-frozen off"):
        run(distill, "--teacher", teacher, "--out", tmp_path / "spar", *RECIPE,
            "--cache-frozen", tmp_path / "tokens")


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_batches_of_two(fork, teacher, tmp_path):
    """Bit for bit; so does a run of which one process was killed, the other left with one line, and
    both started again."""
    flags = ["--teacher", teacher, *RECIPE, "--cache-frozen", teacher.parent / "tokens"]
    assert fork("distill", [*flags, "--out", tmp_path / "one", "--batch-size", 2])[0] == [0]
    codes, outputs = fork("distill", [*flags, "--out", tmp_path / "two"], world=2)
    assert codes == [0, 0], outputs
    assert len(losses(tmp_path / "two")) == 40
    assert_same_training(tmp_path / "one", tmp_path / "two")
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        again = [*flags, "--out", tmp_path / name]
        codes, outputs = fork("distill", again, world=2, number=number,
                              lines=tmp_path / name / "log.jsonl")
        assert "Traceback" not in outputs[0]
        if number == signal.SIGKILL:
            assert codes == [1, -number] and "error: process 0 lost the others" in outputs[0]
        else:  # which only one of them got: both save and leave at the same step
            assert codes == [130, 130] and "stopped and saved after step" in outputs[0]
        assert fork("distill", again, world=2)[0] == [0, 0]
        assert_same_training(tmp_path / "two", tmp_path / name)


def test_an_epoch_is_shared_out_whole():
    for count, batch, world in ((20, 2, 2), (21, 4, 2), (3, 6, 3)):
        alone = distill.epoch_order(count, batch, 5, 1)
        shares = [distill.epoch_order(count, batch, 5, 1, rank, world) for rank in range(world)]
        assert set(alone.flatten()) == set(range(count)) and len(alone) == -(-count // batch)
        assert np.array_equal(np.stack(shares, -1).reshape(alone.shape), alone)
        assert not np.array_equal(alone, distill.epoch_order(count, batch, 6, 1))


@pytest.mark.slow
def test_shards_make_what_one_run_makes(fork, micro, photos, teacher, tmp_path):
    """Three machines on one disk, the second interrupted, begun at different times: each map has
    one writer."""
    flags = ["--images", photos, "--backbone", micro, *SMALL, "--out", tmp_path]
    run(extract_teacher, *flags, "--shard", "2/3", "--limit", 10)
    ((tmp_path / "features" / read_json_lines(tmp_path / "index-2of3.jsonl")[0]["image"])
     .with_suffix(".png.npy").write_bytes(b"cut short"))
    for shard in ("3/3", "1/3", "2/3"):
        codes, (output,) = fork("extract_teacher", [*flags, "--shard", shard])
        assert codes == [0], output
    parts = [{entry["file"] for entry in read_json_lines(tmp_path / f"index-{k}of3.jsonl")}
             for k in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20 and "20 of 20" in output
    assert (tmp_path / "index.jsonl").read_bytes() == (teacher / "index.jsonl").read_bytes()
    assert files(tmp_path / "features") == files(teacher / "features")
    (tmp_path / "index.jsonl").unlink()  # as if the last two had merged at the same moment
    assert read_index(tmp_path) == read_index(teacher)
    run(extract_teacher, *flags)  # a run without --shard tidies up
    assert files(tmp_path) == {name: content for name, content in files(teacher).items()
                               if not name.startswith("frozen-")}
    with pytest.raises(WrongCall, match="--shard 4/3.*from 1 to N"):
        run(extract_teacher, *flags, "--shard", "4/3")
