import pytest
import torch
from tiny import build_transformer

from llamagen_hf.llamagen.training.generator_models import DROPOUTS, ConditionToCodes


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_noise_is_in_the_codes_that_are_read_while_training_alone(conditioning):
    dropouts = dict.fromkeys(("condition_dropout", *DROPOUTS), 0.0)
    model = build_transformer(conditioning=conditioning, **dropouts)
    read = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].detach()))
    codes = torch.randint(64, (32, 16))
    if conditioning == "class":
        condition = {"class_labels": torch.full((32,), 3)}
    else:
        condition = {"prompt_embeds": torch.randn(32, 12, 16), "prompt_attention_mask": torch.ones(32, 12).long()}
    noisy = ConditionToCodes(model, code_noise=0.5)

    measured = noisy.eval()(codes, **condition)
    plain = ConditionToCodes(model).train()(codes, **condition)
    torch.testing.assert_close(measured, plain)
    assert torch.equal(read[0][:, -15:], codes[:, :-1])

    noisy.train()(codes, **condition)
    assert read[-1].max() < model.config.vocab_size + model.config.num_classes
    is_other = read[-1][:, -15:] != codes[:, :-1]
    assert 0.15 < is_other.float().mean() < 0.35
    shares = is_other.float().mean(1)
    assert shares.max() < 0.8 and shares.min() < 0.1  # each image has its own
    assert is_other.any(0).all()  # at any place
    if conditioning == "class":
        assert (read[-1][:, 0] == 64 + 3).all()
