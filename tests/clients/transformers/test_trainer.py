"""transformers' Trainer on packed documents: the loss curve of eager attention, and of documents that are padded."""

import pytest
import torch
import transformers
from tiny_models import TINY
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import aiter.transformers  # noqa: F401 - registers the names
from aiter import plan


def documents():
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 40, (16,), generator=generator).tolist()
    texts = [(torch.arange(length) * 3 + length) % 97 for length in lengths]  # something to be learned
    return [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]


def train(family, implementation, packed, folder, device="cpu", **arguments):
    """Losses of eight steps of four documents each; on a GPU in bfloat16, by autocast."""
    torch.manual_seed(3)
    window = dict(sliding_window=8) if family == "mistral" else {}
    config = transformers.AutoConfig.for_model(family, **TINY, pad_token_id=0, **window)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packed else _padded
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        disable_tqdm=True,
        seed=5,
    )
    trainer = Trainer(
        model, TrainingArguments(**{**options, **arguments}), train_dataset=documents(), data_collator=collator
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _padded(features):
    """Right-padded, and a document's first token is predicted from nothing, as in packed rows."""
    longest = max(len(feature["input_ids"]) for feature in features)
    rows, masks, labels = [], [], []
    for feature in features:
        ids, missing = feature["input_ids"], longest - len(feature["input_ids"])
        rows.append(ids + [0] * missing)
        masks.append([1] * len(ids) + [0] * missing)
        labels.append([-100, *ids[1:]] + [-100] * missing)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(masks),
        "labels": torch.tensor(labels),
    }


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["aiter", "aiter_flash2"])
def test_packed_documents_train_as_padded_ones(family, name, device, tmp_path, monkeypatch):
    seen, backward = [], plan.backward
    monkeypatch.setattr(plan, "backward", lambda *arguments: seen.append(1) or backward(*arguments))
    eager = train(family, "eager", False, tmp_path, device)
    assert not seen
    packed = train(family, name, True, tmp_path, device)
    assert len(seen) == 8 * 2
    padded = train(family, name, False, tmp_path, device)
    assert len(eager) == 8 and eager[-1] < eager[0] - 0.2
    for losses in (packed, padded):
        assert losses == pytest.approx(eager, rel=2e-3 if device == "cpu" else 1e-2)


def test_with_gradient_checkpointing_and_bfloat16(device, tmp_path):
    options = dict(device=device, gradient_checkpointing=True, bf16=True)
    eager = train("llama", "eager", False, tmp_path, **options)
    packed = train("llama", "aiter", True, tmp_path, **options)
    assert packed == pytest.approx(eager, rel=1e-2)
