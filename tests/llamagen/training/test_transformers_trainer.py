"""The generator under `transformers.Trainer`: what labels mean, and one loss however a step is cut."""

import pytest
import torch
from tiny import build_transformer
from tokenizers import Tokenizer, models
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers import default_data_collator as collate


CODES, CLASSES, GRID = 64, 10, 16


def build(conditioning: str = "class"):
    dropouts = {f"{kind}_dropout": 0.0 for kind in ("embedding", "residual", "ffn", "condition")}
    return build_transformer(conditioning=conditioning, **dropouts)


def make_rows(conditioning: str, count: int = 8) -> list[dict]:
    """Rows whose labels leave out codes, in each row more of them."""
    rows = []
    for i in range(count):
        codes = torch.randint(CODES, (GRID,))
        labels = codes.clone()
        labels[: i + 1] = -100
        if conditioning == "class":
            inputs = {"input_ids": torch.cat([torch.tensor([CODES + i % CLASSES]), codes[:-1]])}
        else:
            inputs = {"input_ids": codes[:-1], "prompt_embeds": torch.randn(12, 16)}
        rows.append(inputs | {"labels": labels})
    return rows


def train_one_step(model, rows, tmp_path, size: int, **kwargs) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all rows, `size` of them at a time."""
    gradients = {}

    def record(*_):
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    class Recorder(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(record)
            return optimizer

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=len(rows) // size,
        max_steps=1, max_grad_norm=0.0, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Recorder(model, arguments, train_dataset=rows, **kwargs)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_a_step_has_one_loss_however_it_is_cut(conditioning, tmp_path):
    rows = make_rows(conditioning)
    whole = build(conditioning)
    expected = whole(**collate(rows)).loss
    expected.backward()
    for size in (8, 4, 1):
        loss, gradients = train_one_step(build(conditioning), rows, tmp_path, size, data_collator=collate)
        assert loss == pytest.approx(expected.item(), abs=1e-4)
        for name, parameter in whole.named_parameters():
            if parameter.grad is not None:  # the null prompt is not in use
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_labels_of_the_language_modeling_collator_are_refused_in_words(tmp_path):
    """It repeats the inputs with the class in front, and leaves out padding."""
    words = {"<pad>": CODES + CLASSES} | {str(i): i for i in range(CODES + CLASSES)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>"
    )
    rows = [{"input_ids": row["input_ids"][: 9 + i]} for i, row in enumerate(make_rows("class", 4))]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert (collator(rows)["labels"] == -100).any()
    with pytest.raises(ValueError, match=r"without the condition.*pass `input_ids\[:, 1:\]`"):
        train_one_step(build(), rows, tmp_path, 4, data_collator=collator)


def test_what_labels_can_mean():
    model, rows = build(), collate(make_rows("class"))
    ids, labels = rows["input_ids"], rows["labels"]
    codes = torch.cat([ids[:, 1:], labels[:, -1:]], dim=1)
    losses = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), codes.flatten(), reduction="none")
    losses = losses.view(codes.shape)
    torch.testing.assert_close(model(ids, labels=codes).loss, losses.mean())
    torch.testing.assert_close(model(ids, labels=labels).loss, losses[labels != -100].mean())
    torch.testing.assert_close(model(ids, labels=codes[:, :5].int()).loss, losses[:, :5].mean())
    torch.testing.assert_close(model(ids, labels=codes, num_items_in_batch=2).loss, losses.sum() / 2)
    whole = torch.cat([ids, codes[:, -1:]], dim=1)  # the last code predicts nothing
    torch.testing.assert_close(model(whole, labels=whole[:, 1:]).loss, losses.mean())
    same = torch.full_like(codes, 7)  # of one color: as inputs the labels would look the same
    assert model(torch.cat([ids[:, :1], same[:, 1:]], dim=1), labels=same.masked_fill(labels == -100, -100)).loss > 0


def test_labels_that_are_all_left_out_add_nothing():
    model, rows = build(), collate(make_rows("class"))
    loss = model(rows["input_ids"], labels=torch.full_like(rows["labels"], -100)).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


CODES_ALONE = "`labels` must be the codes to predict, 0 to 63"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ids, codes: ids, CODES_ALONE),
        (lambda ids, codes: ids.index_fill(1, torch.tensor([0]), -100), CODES_ALONE),
        (lambda ids, codes: ids.index_fill(1, torch.tensor([0, 3, 4]), -100), CODES_ALONE),
        (lambda ids, codes: codes.index_fill(1, torch.tensor([2]), 64), CODES_ALONE),
        (lambda ids, codes: codes.index_fill(1, torch.tensor([2]), -1), CODES_ALONE),
        (lambda ids, codes: torch.cat([ids[:, :1], codes], dim=1), r"shape \(8, 17\); expected \(batch, n\)"),
        (lambda ids, codes: codes.view(8, 4, 4), r"shape \(8, 4, 4\); expected \(batch, n\)"),
        (lambda ids, codes: codes[0], r"shape \(16,\); expected \(batch, n\)"),
        (lambda ids, codes: codes[:2], "has 2 rows, but the inputs have 8"),
        (lambda ids, codes: codes.float(), "torch.float32; expected integers"),
    ],
    ids=["class", "left out", "more left out", "beyond", "negative", "long", "grid", "flat", "few", "float"],
)
def test_labels_that_can_not_be_meant_are_one_sentence(change, message):
    rows = collate(make_rows("class"))
    ids, codes = rows["input_ids"], torch.cat([rows["input_ids"][:, 1:], rows["labels"][:, -1:]], dim=1)
    with pytest.raises(ValueError, match=message):
        build()(ids, labels=change(ids, codes))


def test_labels_beyond_the_inputs_and_with_some_logits_are_refused():
    rows = collate(make_rows("text"))
    model = build("text")
    with pytest.raises(ValueError, match="holds 16 codes, but the inputs predict only 6"):
        model(rows["input_ids"][:, :5], prompt_embeds=rows["prompt_embeds"], labels=rows["labels"])
    with pytest.raises(ValueError, match="leave out `logits_to_keep`"):
        model(**rows, logits_to_keep=1)
