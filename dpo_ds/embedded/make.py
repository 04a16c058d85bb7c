"""Makes the embedded default from stories.py: a tokenizer, a tiny GPT-2 that has learned the stories, preference pairs.

    python -m dpo_ds.embedded.make             writes tiny-gpt2/ and sample.jsonl.gz here (five minutes, two cores)
    python -m dpo_ds.embedded.make --check     tells whether what lies there is what this would write

Tokenizer and pairs come out the same to the byte. Weights follow the machine's arithmetic, so --check asks instead
that the stored ones predict stories that they were not trained on as well as they did when they were made.
"""

import argparse
import gzip
import io
import itertools
import json
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo_ds.embedded import model_folder, sample_file
from dpo_ds.embedded.stories import preferences, stories

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 768, 128, 128, 4, 4
END = "<|endoftext|>"
TOKENIZER_SEED, TRAINING_SEED, HELD_OUT_SEED, PAIRS_SEED = 1, 2, 3, 4
PAIRS = 1000
STEPS, STORIES, PEAK_RATE = 3000, 16, 1.5e-3
WORST_LOSS = 0.40  # nats a token on stories not trained on


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, like GPT-2's, of the stories' own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(stories(TOKENIZER_SEED), 5000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels without end, [STORIES, longest] each: a story a row, which ends with EOS; padded."""
    source = stories(seed)
    end = tokenizer.eos_token_id
    while True:
        rows = [torch.tensor([*tokenizer(next(source))["input_ids"], end]) for _ in range(STORIES)]
        ids, labels = (torch.nn.utils.rnn.pad_sequence(rows, True, fill) for fill in (end, -100))
        yield ids, labels


def train_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    torch.manual_seed(TRAINING_SEED)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS, pct_start=0.1)
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, TRAINING_SEED), STEPS)):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def held_out_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Nats a token on stories of another seed."""
    ids, labels = next(batches(tokenizer, HELD_OUT_SEED))
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


def make_sample(tokenizer: PreTrainedTokenizerFast) -> bytes:
    """The gzipped lines; without a time or name in the archive, so that they are the same every time."""
    pairs = preferences(PAIRS_SEED, PAIRS, length=lambda text: len(tokenizer(text)["input_ids"]))
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", filename="", mtime=0) as file:
        file.write("".join(json.dumps(pair) + "\n" for pair in pairs).encode())
    return out.getvalue()


def write() -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(model_folder())
    sample_file().write_bytes(make_sample(tokenizer))
    model = train_model(tokenizer)
    model.save_pretrained(model_folder())
    print(f"on stories of another seed: {held_out_loss(model, tokenizer):.3f} nats a token")


def check() -> list[str]:
    """What differs from what `write` would write; nothing, if all is well."""
    tokenizer = make_tokenizer()
    stored = PreTrainedTokenizerFast.from_pretrained(model_folder())
    wrong = []
    if stored.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        wrong.append("the tokenizer is not the one that stories.py gives")
    # zlib may pack the same lines in other bytes elsewhere
    if gzip.decompress(sample_file().read_bytes()) != gzip.decompress(make_sample(tokenizer)):
        wrong.append("sample.jsonl.gz is not what stories.py gives")
    loss = held_out_loss(GPT2LMHeadModel.from_pretrained(model_folder(), use_safetensors=True).eval(), stored)
    if not loss < WORST_LOSS:  # nor is NaN
        wrong.append(f"the weights predict new stories with {loss:.3f} nats a token; {WORST_LOSS} at most are right")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.embedded.make", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare what is stored, write nothing")
    if parser.parse_args().check:
        raise SystemExit("\n".join(check()) or None)
    write()
