"""What a newcomer sees: no arguments, typing errors, the help."""

import pytest

import construct_noise
import main_CLIP
import main_NPC


@pytest.mark.parametrize("module", [main_NPC, main_CLIP])
def test_no_arguments_say_in_five_lines_what_to_do(module):
    with pytest.raises(SystemExit) as caught:
        module.main([])
    lines = str(caught.value.code).splitlines()
    assert len(lines) == 5
    text = "\n".join(lines)
    for word in (f"python {module.__name__}.py --dataset", "--eval --resume", "make demo", "--help",
                 "dataset/README.md"):
        assert word in text


@pytest.mark.parametrize("argv, near", [
    (["--datset", "coco"], "--dataset"), (["--batchsize", "8"], "--batch_size"),
    (["--dataset", "coca"], "coco"), (["--dataset", "f30"], "f30k"),
    (["--recipe", "papper"], "paper"), (["--precision", "amp_bf6"], "amp_bf16")])
def test_typing_errors_suggest_the_near_word(argv, near, capsys):
    with pytest.raises(SystemExit) as caught:
        main_NPC.main(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1
    assert f"did you mean {near}?" in error


def test_far_words_suggest_nothing(capsys):
    with pytest.raises(SystemExit):
        construct_noise.main(["--zzzz"])
    assert "did you mean" not in capsys.readouterr().err


def test_help_is_grouped_and_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        main_NPC.main(["--help"])
    text = capsys.readouterr().out
    for group in ("data:", "model:", "method:", "optimisation:", "run:", "evaluation:"):
        assert f"\n{group}\n" in text
    for block in text.split("\n  --")[1:]:
        assert len(" ".join(block.split()).split(" ", 1)[-1]) > 15, block
