"""The command line's own words: near matches, hints, and options named as they are typed."""

import pytest

from sdrt.cli.main import build_parser, main
from sdrt.cli.parser import name_flags
from sdrt.cli.run import options_from_arguments
from sdrt.errors import UsageError

PROMPT = "a red circle"


def said_of(capsys, arguments, code=2):
    assert main(arguments) == code
    said = capsys.readouterr()
    assert not said.out and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", PROMPT, "--prompt", "y"], "pass the text itself"),
        (["run", PROMPT, "-p", "y"], "pass the text itself"),
        (["run", PROMPT, "--fp16"], "sdrt build --help"),
        (["run", PROMPT, "-s", "5"], "did you mean `--steps`?"),
        (["run", PROMPT, "--outdir=x"], "did you mean `--output`?"),
        (["run", PROMPT, "--batch-size", "2"], "did you mean `--num-images`?"),
        (["run", PROMPT, "--model", "shapes"], "did you mean `--bundle`?"),
        (["compare", PROMPT, "--sampler", "Euler"], "did you mean `--schedulers`?"),
        (["serve", "-p", "80"], "did you mean `--port`?"),
        (["serve", "--api-key", "k"], "did you mean `--keys`?"),
        (["inspect", "shapes"], "did you mean `--bundle shapes`?"),
        (["build", "shapes"], "did you mean `--model shapes`?"),
        (["list", "shapes"], "run `sdrt list --help`"),
        (["--verison"], "did you mean `--version`?"),
        (["completion", "tcsh"], "expected one of bash, zsh, fish"),
        (["completion", "zish"], "did you mean `zsh`?"),
        (["help", "rnu"], "did you mean `run`?"),
    ],
)
def test_what_other_tools_accept_gets_what_to_type_here(capsys, arguments, hint):
    assert hint in said_of(capsys, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", PROMPT, "--seed", "-1"], "--seed is -1; expected an integer from 0 to"),
        (["run", PROMPT, "--steps", "0"], "--steps is 0; expected an integer from 1 to 1000"),
        (["run", PROMPT, "--reuse", "0"], "--reuse is 0"),
        (["run", PROMPT, "-n", "0"], "--num-images is 0"),
        (["run", PROMPT, "--clip-skip", "101"], "--clip-skip is 101"),
        (["run", PROMPT, "--seed", "1.5"], "--seed '1.5' is not an integer"),
        (["run", PROMPT, "--strength", "x"], "--strength 'x' is not a number"),
        (["run", PROMPT, "--backend"], "--backend expected one argument"),
        (["run", PROMPT, "--crop", "3"], "--crop '3' is not two integers"),
        (["run", PROMPT, "--device", "tpu"], "--device is 'tpu'"),
        (["run", PROMPT, "--scheduler", ""], "unknown scheduler"),
        (["run", PROMPT, "--scheduler-option", "foo=1"], "unknown --scheduler-option foo"),
        (["serve", "--slots", "0"], "--slots 0; expected 1 to 10000"),
        (["completion", "tcsh"], "unknown shell `tcsh`"),
    ],
)
def test_messages_name_the_option_as_it_is_typed(shapes, capsys, arguments, message):
    assert said_of(capsys, arguments).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("num_inference_steps is 0", "--steps is 0"),
        ("strength 0.1 of 3 steps is less", "--strength 0.1 of 3 steps is less"),
        ("both mask_image and strength", "both --mask and strength"),
        ("scheduler option solver_order is 9", "scheduler option solver_order is 9"),
        ("a.png does not exist", "a.png does not exist"),
    ],
)
def test_names_of_python_become_flags(message, shown):
    flags = {"num_inference_steps": "--steps", "mask_image": "--mask", "scheduler": "--scheduler"}
    error = name_flags(UsageError(message, hint="h"), {**flags, "strength": "--strength"})
    assert (error.message, error.hint) == (shown, "h")


def test_an_argument_named_like_an_option_becomes_that_option():
    typed = ["--steps", "7", "--reuse", "2", "--crop", "8x16", "--guidance-interval", "0.1:0.8"]
    args = build_parser().parse_args(["run", PROMPT, *typed, "--literal", "--cut", "-n", "3"])
    options = options_from_arguments(args)
    assert (options.num_inference_steps, options.feature_reuse) == (7, 2)
    assert options.crops_coords_top_left == (16, 8) and options.guidance_interval == (0.1, 0.8)
    assert not options.weighting and options.long_prompts == "cut"
    assert options.num_images_per_prompt == 3


def test_help_is_a_command_too(capsys):
    for typed, begin in ([], "usage: sdrt ["), (["run"], "usage: sdrt run"):
        with pytest.raises(SystemExit) as done:
            main(["help", *typed])
        assert not done.value.code and capsys.readouterr().out.startswith(begin)


@pytest.mark.parametrize("words", [["a", "red", "circle"], ["red", "circle"]])
def test_a_prompt_without_quotes_is_refused(shapes, capsys, words):
    said = said_of(capsys, ["run", *words])
    assert f'quote the prompt: `sdrt run "{" ".join(words)}"`' in said


@pytest.mark.parametrize("prompts", [["red,", "blue"], ["circle"], ["a circle", "square"]])
def test_several_prompts_are_not_refused(shapes, tmp_path, capsys, prompts):
    assert main(["run", *prompts, "--steps", "1", "-q", "-o", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == len(prompts)


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        (("--lora", "nope"), 4, "There is no LoRA named 'nope' in"),
        (("--lora", "image.png"), 4, "is not a safetensors file\nhint: pass a .safetensors file"),
        (("--lora", "."), 4, "is a folder\nhint: pass the .safetensors file"),
        (("--lora", "text.safetensors"), 4, "is not a safetensors file\nhint: download it again"),
        (("--bundle", "image.png"), 3, "is a file; a bundle is a folder\nhint: `sdrt list`"),
        (("--bundle", "text.safetensors"), 3, "hint: `sdrt build --model"),
    ],
)
def test_wrong_files_are_named_before_anything_is_loaded(
    shapes, tmp_path, capsys, monkeypatch, option, code, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("image.png", "text.safetensors"):
        (tmp_path / name).write_text("neither")
    said = said_of(capsys, ["run", PROMPT, *option], code)
    assert message in said and "ONNX Runtime" not in said
    assert said.count("nope") <= 1


def test_a_file_that_is_no_checkpoint_is_called_so(tmp_path, capsys):
    (tmp_path / "a.png").write_text("neither")
    said = said_of(capsys, ["build", "--model", str(tmp_path / "a.png")], 4)
    assert "a.png is not a .safetensors file" in said
