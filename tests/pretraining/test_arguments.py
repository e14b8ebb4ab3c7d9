import pytest
from transformers import HfArgumentParser

from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments


@pytest.fixture
def arguments(tmp_path):
    return lambda **settings: LengthValueTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_the_defaults_are_the_papers_loss_with_bootstrapped_tails(arguments):
    args = arguments()
    assert (args.loss, args.td_lambda, args.parameterization, args.censoring) == ("mse", 1.0, "value", "bootstrap")
    assert args.packing and args.lora_rank == 0 and not args.frozen_backbone


def test_the_token_mean_is_always_one_over_all_processes(arguments):
    args = arguments(average_tokens_across_devices=False, remove_unused_columns=True)
    assert args.average_tokens_across_devices and not args.remove_unused_columns
    assert args.batch_eval_metrics and args.label_names == ["labels"]


def test_a_command_line_sets_them(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--loss", "bce", "--packing", "false"]
    flags += ["--td_lambda", "0.9", "--lora_rank", "8", "--lora_target_modules", "q_proj", "v_proj"]
    (args,) = HfArgumentParser([LengthValueTrainingArguments]).parse_args_into_dataclasses(flags)
    assert (args.loss, args.packing, args.td_lambda, args.lora_rank) == ("bce", False, 0.9, 8)
    assert args.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "huber"}, "loss 'huber' does not exist: take 'mse', 'bce'"),
        ({"parameterization": "tokens"}, "parameterization 'tokens' does not exist: take 'value', 'length', 'log_l"),
        ({"censoring": "ignore"}, "censoring 'ignore' does not exist: take 'bootstrap', 'bound', 'drop', 'official'"),
        ({"td_lambda": 1.5}, "td_lambda is 1.5: it must lie in"),
        ({"td_lambda": float("nan")}, "td_lambda is nan"),
        ({"loss": "bce", "parameterization": "length"}, "loss 'bce' compares the logit with 1 - gamma"),
        ({"td_lambda": 0.9, "censoring": "bound"}, "td_lambda 0.9 values what follows a state by the model"),
        ({"lora_rank": -1}, "lora_rank must be a positive rank, or 0"),
        ({"lora_rank": 4, "frozen_backbone": True}, "frozen_backbone leaves nothing for LoRA to adapt"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)
