"""A help desk that looks things up: what there is, how many, where, and what changed since.

A system message or the user says what stands where; the user then asks, takes, brings and moves
things, and the assistant's replies follow from what was said. `is_correct` tells whether they do.
How a reply is put (`TRAITS`) has nothing to do with what it says: in `conversations` every trait is
in half of the replies, in `pairs` the chosen reply has the planted ones and the rejected has not.

Seeds count upwards: `conversations(seed, n)` are those of `seed` to `seed + n - 1`, and
`pairs(seed, n)` continue the same conversations, so disjoint ranges share nothing. Held-out
conversations are also made of other facts: see `generator.is_held_out`.

A reply that names any value of the right sort, wherever it comes from, is right one time in eight
at most. One that copies it from the conversation without looking which item or event was asked
about would be right three times in four, because half of the conversations have one item only:
that is the first thing that a small model learns, and looking the item up is the next.
"""

from jaxconv.data.synthetic.assistant.generator import conversations, pairs, prompts, swap
from jaxconv.data.synthetic.assistant.style import TRAITS, style
from jaxconv.data.synthetic.assistant.truth import is_correct

__all__ = ["TRAITS", "conversations", "is_correct", "pairs", "prompts", "style", "swap"]
