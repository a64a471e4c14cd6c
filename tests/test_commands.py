"""The commands as a person types them: what they print, and that every mistake is one line that
names the thing and the remedy."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hostile_run import seal

import checkpoints
import config as configs
import evaluate
import infer
import train
from assistant.assistant import Assistant
from assistant.flags import add_model_flags
from assistant.messages import user_message
from assistant.sampling import Sampling
from data.dataset import load_questions
from data.images import load_image
from data.world import __main__ as world
from errors import PhiSightError, run_main
from evaluation.questions import REPORTED_ONLY
from ops import kernels
from training.reporting import resume_command


def picture() -> str:
    return str(sorted((runs.world() / "images").glob("held_out_*.png"))[0])


def ask(*arguments: object) -> int:
    return infer.main(["--run", str(runs.finished_run()), *map(str, arguments)])


def error_of(main, *arguments: object) -> str:
    with pytest.raises(PhiSightError) as error:
        main(list(map(str, arguments)))
    return str(error.value)


# -- infer.py -------------------------------------------------------------------------------------


def test_infer_streams_the_answer_that_json_gives_whole(capsys):
    runs.finished_run()
    capsys.readouterr()
    question = ("--image", picture(), "--prompt", "What shape is it?", "--max-new-tokens", 12)
    assert ask(*question) == 0
    streamed = capsys.readouterr().out
    assert ask(*question, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {
        "answer",
        "prompt",
        "images",
        "checkpoint",
        "weights_digest",
        "finish_reason",
        "tokens",
        "decoding",
        "seconds",
    }
    by_kernels = said["decoding"].startswith("a token in one compiled call")
    assert by_kernels == bool(kernels.available()[0])
    assert said["seconds"].keys() == {"load", "first_token", "total"}
    assert (said["prompt"], said["images"]) == ("What shape is it?", [picture()])
    assert said["checkpoint"] == str(checkpoints.checkpoints_in(runs.finished_run())[-1])
    assert streamed == said["answer"] + "\n"


def test_infer_takes_several_pictures_and_a_checkpoint_folder(capsys):
    folder = checkpoints.checkpoints_in(runs.finished_run())[0]
    prompt = "<image> or <image>: which one has a star?"
    assert (
        infer.main(
            [
                "--run",
                str(folder),
                "--image",
                picture(),
                "--image",
                picture(),
                "--prompt",
                prompt,
                "--max-new-tokens",
                "2",
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(said["images"]) == 2 and said["checkpoint"] == str(folder)


def test_a_seed_makes_sampling_repeatable():
    def answer(seed: int) -> str:
        return "".join(
            runs.assistant().reply(
                [user_message("Describe the picture.", [picture()])], 12, Sampling(100.0), seed
            )
        )

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


HEAVY = {"gradio", "whisper", "librosa", "numba", "sklearn", "fastapi", "pandas", "openai"}
# Nothing of what a command prints needs these: they are loaded when a model is.
MODELS = {"torch", "transformers", "bitsandbytes", "tokenizers", "safetensors", "scipy", "triton"}


def modules_after(*arguments: str) -> set[str]:
    """The modules that `python infer.py ARGUMENTS` has imported when it ends."""
    told = runs.command(
        "-c",
        "import infer, sys\ntry:\n    infer.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)",
        *arguments,
    )
    assert told.returncode == 0, told.stderr
    return set(told.stderr.split())


def test_help_loads_no_model_library():
    assert not modules_after("--help") & (MODELS | HEAVY)


def test_a_typed_question_loads_only_what_it_needs():
    asked = ("--run", str(runs.finished_run()), "--image", picture(), "--prompt", "What?")
    loaded = modules_after(*asked, "--max-new-tokens", "2")
    # The 4-bit kernels need numba, which takes products of matrices from scipy, used or not.
    assert not loaded & (HEAVY - {"numba"} | {"scipy.signal", "scipy.stats", "scipy.optimize"})
    assert not loaded & {"torch._dynamo", "torch._inductor", "sympy", "speech.whisper"}
    assert not loaded & {"transformers", "triton", "huggingface_hub"}


@pytest.mark.parametrize(
    ("prompt", "images", "kinds"),
    [
        ("What?", ["a"], "image text"),
        ("What?", ["a", "b"], "image image text"),
        ("<image>What?", ["a"], "image text"),
        ("What?<image>", ["a"], "text image"),
        ("One <image> or two <image>?", ["a", "b"], "text image text image text"),
        ("What?", [], "text"),
    ],
)
def test_where_pictures_stand_in_a_prompt(prompt, images, kinds):
    message = user_message(prompt, images)
    assert [part.kind for part in message.parts] == kinds.split()
    assert [part.value for part in message.parts if part.kind == "image"] == images
    assert all(part.value == part.value.strip() for part in message.parts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "<image> What?"], "1 <image> places and 0 pictures"),
        (["--prompt", "<image> <image>?", "--image", "a"], "2 <image> places and 1 pictures"),
        (
            ["--prompt", "<image>?", "--image", "a", "--image", "b"],
            "1 <image> places and 2 pictures",
        ),
        (["--prompt", "  "], "--prompt: is empty"),
        (["--prompt", "What?", "--imgae", "a"], "--imgae: no such flag; did you mean --image?"),
        (["--prompt", "What?", "--imgae=a"], "--imgae=a: no such flag; did you mean --image?"),
        (["--prompt", "What?", "--zzz"], "--zzz: no such flag; see infer.py --help"),
        (["--image", "a"], "give one of --prompt, --audio, --chat and --batch"),
        (["--prompt", "What?", "--temperature", "-1"], "--temperature -1.0"),
        (["--prompt", "What?", "--temperature", "hot"], "--temperature"),
        (["--prompt", "What?", "--top-p", "0"], "--top-p 0.0"),
        (["--prompt", "What?", "--top-k", "-1"], "--top-k -1"),
        (["--prompt", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "What?", "--seed", str(2**64)], "--seed 18446744073709551616"),
        (["--prompt", "What?", "--seed", "-1"], "--seed -1"),
        (["--prompt", "What\udcff?"], "--prompt: is not valid Unicode"),
        (["--prompt", "What?", "--device", "toaster"], "--device"),
        (["--prompt", "What?", "--run", "no-such-run"], "no checkpoint in no-such-run"),
    ],
)
def test_what_infer_refuses(arguments, said):
    assert said in error_of(infer.main, *arguments)


def test_a_conversation_that_is_too_long_names_both_numbers():
    message = error_of(infer.main, "--run", runs.finished_run(), "--prompt", "star " * 5000)
    most = runs.assistant().parts.base.model.config.max_position_embeddings
    assert f"the model reads {most}" in message and "shorten" in message


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    for file in runs.BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = error_of(
        infer.main, "--run", runs.finished_run(), "--prompt", "What?", "--base", tmp_path
    )
    assert "another base" in message and message.endswith("name the right one with --base")
    assert "CLIP" not in message and "vision" not in message


def test_another_tokenizer_in_the_base_is_refused(tmp_path):
    """Its ids would be those of other words, and the answers nonsense."""
    for file in runs.BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    message = error_of(
        infer.main, "--run", runs.finished_run(), "--prompt", "What?", "--base", tmp_path
    )
    assert f"was trained with another tokenizer.json than that of {tmp_path}; restore" in message


def test_a_run_that_does_not_say_its_tokenizer_is_read(tmp_path):
    """As those of former versions: to ask it, and to go on with it."""
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    for checkpoint in checkpoints.checkpoints_in(run):
        config = json.loads((checkpoint / "config.json").read_text())
        assert config.pop("tokenizer_fingerprint")
        (checkpoint / "config.json").write_text(json.dumps(config))
        seal(checkpoint)
    assert Assistant.load(run).parts.base.name == str(runs.BASE)
    assert runs.resume(run) == 0


def test_a_base_that_has_moved_can_be_named(tmp_path):
    (tmp_path / "phi3").symlink_to(runs.BASE)
    assistant = Assistant.load(runs.finished_run(), base=str(tmp_path / "phi3"))
    assert assistant.parts.base.name == str(tmp_path / "phi3")


def test_a_damaged_checkpoint_folder_is_refused(tmp_path):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    checkpoint = checkpoints.checkpoints_in(run)[-1]
    (checkpoint / "image_projector.safetensors").unlink()
    message = error_of(infer.main, "--run", checkpoint, "--prompt", "What?")
    assert "image_projector.safetensors" in message


# -- pictures -------------------------------------------------------------------------------------


def bomb() -> bytes:
    """The header of a PNG of 2.5 billion pixels, and no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"#!/bin/sh\necho hello\n", "not a picture"),
        ("half", "truncated"),
        (bomb(), "the limit of"),
    ],
    ids=["missing", "empty", "not a picture", "truncated", "bomb"],
)
def test_a_bad_picture_is_told_before_the_model_is_loaded(content, said, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "load_assistant", None)  # calling it would be a TypeError
    path = tmp_path / "x.png"
    if content == "half":
        whole = Path(picture()).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    message = error_of(infer.main, "--image", path, "--prompt", "What?")
    assert str(path) in message and said in message


def odd_pictures(folder: Path) -> list[str]:
    """Pictures of unusual modes; each is one of the world's."""
    plain = Image.open(picture()).convert("RGB")
    transparent = plain.copy()
    transparent.putalpha(plain.convert("L"))
    wide = numpy.asarray(plain.convert("L")).astype(numpy.uint16) * 257
    rotated = Image.Exif()
    rotated[0x0112] = 6
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.quantize(16).save(folder / "palette.png")
    Image.fromarray(wide).save(folder / "sixteen_bits.png")
    transparent.save(folder / "alpha.png")
    plain.convert("LA").save(folder / "grey_alpha.png")
    plain.convert("1").save(folder / "two_colours.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=rotated)
    return sorted(map(str, folder.iterdir()))


def test_pictures_of_every_mode_simply_work(tmp_path, capsys):
    for path in odd_pictures(tmp_path):
        answer = list(runs.assistant().reply([user_message("What?", [path])], 2))
        assert all(isinstance(piece, str) for piece in answer)
    capsys.readouterr()
    given = [word for path in odd_pictures(tmp_path)[:3] for word in ("--image", path)]
    assert ask(*given, "--prompt", "What?", "--max-new-tokens", 2, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 3


def test_a_rotated_picture_is_seen_upright(tmp_path):
    odd_pictures(tmp_path)
    seen = [
        runs.assistant().features([load_image(path)])
        for path in (picture(), tmp_path / "rotated.png")
    ]
    assert torch.equal(*seen)


# -- train.py -------------------------------------------------------------------------------------


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A star."}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("[]", "no usable record"),
        ("{", "JSON"),
        ("[1, 2", "not JSON"),
        ('"text"', "not a list"),
        (json.dumps([{"id": "a", "conversations": TURNS[:1]}]), "no assistant turn"),
        (
            json.dumps(
                [
                    {
                        "id": "a",
                        "image": "gone.png",
                        "conversations": [{"from": "human", "value": "<image>"}, TURNS[1]],
                    }
                ]
            ),
            "gone.png",
        ),
    ],
    ids=["empty", "no records", "open brace", "cut off", "no list", "malformed", "no picture"],
)
def test_bad_data_is_one_clear_error(content, said, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(content)
    message = error_of(train.main, *runs.flags(tmp_path / "run", data=data))
    assert str(data) in message and said in message
    assert not checkpoints.checkpoints_in(tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data": "gone.json"}, "gone.json: no such file; give --data FILE"),
        ({"data": ""}, "--data: not given"),
        ({"images": "gone"}, "gone: no such folder; give --images"),
        ({"base": "./gone"}, "no such folder"),
        ({"vision": "./gone"}, "no such folder"),
        ({"lora_targets": "c_attn"}, "c_attn matches no layer"),
        ({"vision_layer": 1000}, "--vision-layer 1000"),
        ({"row_tokens": 5}, "--row-tokens 5"),
        ({"max_text_tokens": 1}, "nothing left to train on"),
        ({"batch_size": 0, "epochs": 0}, "--batch-size must be at least 1"),
    ],
)
def test_what_train_refuses(fields, said, tmp_path):
    assert said in error_of(train.main, *runs.flags(tmp_path / "run", **fields))
    assert not checkpoints.checkpoints_in(tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path):
    message = error_of(train.main, *runs.flags(tmp_path / "run", device="cuda"))
    assert "--device cuda" in message and "--device cpu" in message


# -- evaluate.py ----------------------------------------------------------------------------------


def test_evaluate_as_json(capsys):
    run = runs.finished_run()
    capsys.readouterr()
    assert evaluate.main(["--run", str(run), "--json", "--max-new-tokens", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    percentages = ("held_out", "novel_pairs", "swapped", "blank")
    assert found.keys() == {
        *percentages,
        "questions",
        "by_kind",
        "novel_by_kind",
        "alignment",
        "intervals",
        "checkpoint",
        "weights_digest",
        "seconds",
    }
    assert all(0 <= found[name] <= 100 for name in percentages)
    assert found["intervals"].keys() == {*percentages, "alignment"}
    for name, (low, high) in found["intervals"].items():
        assert low - 0.01 <= found[name] <= high + 0.01
    assert found["alignment"] == pytest.approx(found["held_out"] - found["swapped"], abs=0.011)
    asked = load_questions(runs.world() / "held_out.jsonl")
    assert set(found["by_kind"]) == {question.kind for question in asked}
    counted = [q for q in asked if q.kind not in REPORTED_ONLY]
    assert found["questions"] == len(counted) < len(asked)
    assert found["checkpoint"].startswith(str(run))


def test_evaluate_prints_a_table_of_other_questions(tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            json.dumps(
                {"question_id": i, "image": name, "text": "Is there a star?", "label": "yes"}
            )
            + "\n"
            for i, name in enumerate(("held_out_000000.png", "held_out_000001.png"))
        )
    )
    run = runs.finished_run()
    capsys.readouterr()
    assert (
        evaluate.main(
            [
                "--run",
                str(run),
                "--held-out-questions",
                str(questions),
                "--novel-pair-questions",
                str(questions),
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    for word in ("held_out", "swapped", "blank", "novel_pairs", "alignment: "):
        assert word in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (None, "no such file"),
        ("", "the file is empty"),
        ("{}", "line 1: `question_id` is missing"),
        ('{"question_id": 1, "image": "gone.png", "text": "What?", "label": "a"}', "gone.png"),
    ],
)
def test_bad_questions_are_refused(line, said, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_assistant", lambda _: runs.assistant())
    path = tmp_path / "questions.jsonl"
    if line is not None:
        path.write_text(line)
    assert said in error_of(evaluate.main, "--held-out-questions", path)


def test_an_evaluation_without_a_token_to_answer_in_is_refused():
    assert "--max-new-tokens" in error_of(evaluate.main, "--max-new-tokens", "0")


# -- checkpoints.py and data.world ----------------------------------------------------------------


def test_show_verify_and_diff(tmp_path, capsys):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    capsys.readouterr()
    assert checkpoints.main(["show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == runs.newest_step(run)
    assert set(shown["owners"]) == set(checkpoints.OWNERS.values())
    assert shown["trainer_state"]["finished"]
    assert checkpoints.main(["show", str(run)]) == 0
    told = capsys.readouterr().out
    assert "verified" in told
    assert f"\nbase: {shown['base']}\nvision: {shown['vision']}\nprojector: mlp, " in told
    assert [Path(shown[member]).name for member in ("base", "vision")] == ["phi3", "clip"]
    assert shown["lora"].startswith("rank 16, alpha 16.0, on ") and "qkv_proj" in shown["lora"]
    assert f"\nlora: {shown['lora']}\n" in told
    assert checkpoints.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("intact") == 3  # the log and two checkpoints
    older, newest = checkpoints.checkpoints_in(run)
    assert checkpoints.main(["diff", str(older), str(newest)]) == 1
    assert "different" in capsys.readouterr().out
    (newest / "optimizer.safetensors").write_bytes(b"")
    assert checkpoints.main(["verify", str(run)]) == 1
    assert "optimizer.safetensors" in capsys.readouterr().out


def test_the_world_command_writes_what_training_reads(tmp_path, capsys, monkeypatch):
    out = tmp_path / "world"
    monkeypatch.setattr(
        "sys.argv",
        [
            "world",
            "--out",
            str(out),
            "--pictures",
            "3",
            "--held-out",
            "2",
            "--turns",
            "2",
            "--seed",
            "5",
        ],
    )
    world.main()
    written = runs.contents(out)
    assert {"train.json", "held_out.jsonl", "novel_pairs.jsonl", "world.json"} <= written.keys()
    assert sum(name.startswith("images/") for name in written) == 3 + 2 + 2
    assert len(load_questions(out / "novel_pairs.jsonl")) > 2
    capsys.readouterr()
    world.main()
    assert "already there" in capsys.readouterr().out
    assert runs.contents(out) == written


# -- one line, exit code 2, no traceback ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["infer.py", "--image", "no-such-picture.png", "--prompt", "What?"],
            "no-such-picture.png: no such file",
        ),
        (["evaluate.py", "--run", "no-such-run"], "no checkpoint in no-such-run"),
        (["checkpoints.py", "verify", "no-such-run"], "no-such-run: no such folder"),
        (["-m", "data.world", "--pictures", "0"], "--pictures"),
        (["-m", "data.world", "--out", "README.md/world"], "README.md/world: cannot be written"),
        (["-m", "data.preflight", "--data", "no-such.json"], "no-such.json: no such file"),
    ],
    ids=lambda value: value[0 if value[0] != "-m" else 1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_stderr(arguments, said):
    assert said in runs.assert_one_line_error(runs.command(*arguments))


def test_an_error_of_several_lines_is_printed_as_one(capsys):
    def main() -> int:
        raise PhiSightError("picture a\nb.png: no such\n  file; look\tagain")

    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: picture a b.png: no such file; look again\n"


def test_the_exit_code_is_that_of_the_command():
    for given, code in ((None, 0), (0, 0), (1, 1)):
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda: given)
        assert stopped.value.code == code


def test_the_default_run_is_the_one_that_training_writes():
    run = configs.default_config(configs.DEFAULT_PRESET).run
    parser = configs.Parser(prog="any")
    add_model_flags(parser)
    assert parser.parse_args([]).run == run
    config = configs.default_config(configs.DEFAULT_PRESET)
    assert resume_command(config) == "python train.py --resume"
