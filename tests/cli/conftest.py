import json

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

WORDS = ["good", "bad", "fine", "poor", "film", "book", "very", "not"]


@pytest.fixture
def reviews(tmp_path):
    """Return a directory of sentences whose class depends on one word, and the directory of a tiny BERT for them."""
    rows = [
        {"text": f"{adverb} {word} {noun}", "sentiment": "up" if word in ("good", "fine") else "down", "id": i}
        for i, (adverb, word, noun) in enumerate(
            (a, w, n) for _ in range(4) for a in ("very", "not") for w in WORDS[:4] for n in ("film", "book")
        )
    ]
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, part in {"train": rows, "validation": rows[::3], "test": rows[1::3]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=16)
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("bert", vocab_size=13, max_position_embeddings=16, num_labels=2, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    return folder, tmp_path / "bert"
