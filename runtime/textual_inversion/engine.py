"""A text encoder that also reads words which its vocabulary does not have.

Knows the graph that reads token embeddings and the table of the vocabulary's; not files.
"""

import numpy as np

from sdrt.bundle.manifest import TOKEN_EMBEDDINGS, TensorSpec
from sdrt.engine import Engine, Feeds
from sdrt.engine.protocol import release_memory
from sdrt.runtime.text.tokenizer import FIRST_WORD_ID

WORD_EMBEDDINGS = "word_embeddings"


def word_engine_name(encoder: str) -> str:
    """Among a pipeline's engines, the one for a text encoder's chunks with words."""
    return f"{encoder}_words"


def has_words(ids: np.ndarray) -> bool:
    """Whether there is an id of a word of textual inversion."""
    return bool((ids >= FIRST_WORD_ID).any())


class WordEngine:
    """An engine with the input `word_embeddings` [words, width], whose rows the ids from
    `FIRST_WORD_ID` on are.

    The encoder itself reads an ordinary id in their place. So encoders that pool at the highest id,
    those with `eos_token_id` 2 in their configuration, pool at the prompt's end and not at a word.
    """

    def __init__(self, engine: Engine, table_name: str, table: np.ndarray, end: int) -> None:
        """Create it.

        Args:
            engine: With the inputs `input_ids` and `token_embeddings`.
            table_name: Of the weight that holds the embeddings.
            table: The vocabulary's embeddings, [tokens, width].
            end: The id that ends a prompt.
        """
        ids, embeddings = engine.inputs
        words = TensorSpec(WORD_EMBEDDINGS, embeddings.dtype, ("words", *embeddings.shape[2:]))
        self.inputs = (ids, words)
        self.outputs = engine.outputs
        self._engine, self._table_name, self._end = engine, table_name, end
        self._stored = self._table = table

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        ids, words = feeds["input_ids"], feeds[WORD_EMBEDDINGS]
        is_word = ids >= FIRST_WORD_ID
        ordinary = np.where(is_word, int(self._end == 0), ids)
        embeddings = self._table[ordinary]  # [rows, tokens, width], a copy
        embeddings[is_word] = words[ids[is_word] - FIRST_WORD_ID]
        return self._engine({"input_ids": ordinary, TOKEN_EMBEDDINGS: embeddings})

    def refit(self, weights: Feeds) -> None:
        """See `Engine`; the table is looked up here."""
        self._table = weights.get(self._table_name, self._stored)
        self._engine.refit({name: w for name, w in weights.items() if name != self._table_name})

    def release_memory(self) -> None:
        """See `ReleasableMemory`."""
        release_memory(self._engine)

    def close(self) -> None:
        self._engine.close()
