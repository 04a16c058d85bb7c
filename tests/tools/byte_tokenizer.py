"""A small tokenizer of bytes, with the special tokens, the chat template and the habits that a test asks for."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = ["What is the answer? The answer is here.", "Is the answer right? No answer, no question."] * 8


def tokenizer(template=None, specials=("<s>", "</s>"), bos="<s>", eos="</s>", adds="$A", extra=()):
    """A byte-level BPE of some 300 tokens. `adds`: what it writes around a text by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    if adds != "$A":
        ids = [(token, bpe.token_to_id(token)) for token in specials]
        bpe.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    bpe.add_tokens(list(extra))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, chat_template=template, extra_special_tokens=list(specials)
    )
