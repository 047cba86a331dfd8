"""The demo model's tokenizer: one token a byte, and a few special tokens. Any UTF-8 text encodes and decodes exactly.

Text that spells a special token, such as "<eos>", becomes that token's id, as with every Hugging Face tokenizer; it
comes back when decoded with `skip_special_tokens=False`.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<reserved0>", "<reserved1>", "<reserved2>", "<reserved3>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""263, a prime: no tensor-parallel size divides it, so every sharded run meets a padded vocabulary."""


def byte_symbols() -> list[str]:
    """Returns the 256 printable characters that stand for the bytes 0..255 in a byte-level vocabulary.

    This is GPT-2's mapping, which the ByteLevel parts of `tokenizers` use: a printable Latin-1 byte stands for itself,
    the others take the code points from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """Returns a tokenizer whose id of a byte is that byte's value; no merges, and no <bos> is put in front."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
