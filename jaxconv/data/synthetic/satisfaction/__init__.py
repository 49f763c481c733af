"""Users who are content with an assistant or are not, and show it or not: labels of known causes.

A user asks something of a domain and intent, in one of three languages, and the assistant answers.
In what the user says next are *causes*: of a satisfied user mostly those of `SATISFIED`, of a
dissatisfied one those of `DISSATISFIED`, and with probability `noise` one of the other side. A user
may also show nothing. So nobody can tell all labels: `ceiling` is the accuracy of who knows every
cause and the odds by which they were drawn. Users of a domain show some causes more often, whatever
their label (`HABITS`): what is learned in one domain lacks words of others.

Words alone do not tell a cause. Requests and answers are full of thanks, praise, mistakes and
complaints that are somebody else's; users are ironic and deny what a cue says; three causes in ten
are put in words that both sides say, and only the answer before them tells what they mean; one
cause is that the user asks the same again in other words; and a third of the ways to put a cause
are said in held-out conversations alone. So who has a list of all words of all causes stays below
the ceiling too.

Seeds count upwards: `conversations(seed, n)` are those of `seed` to `seed + n - 1`.
"""

from jaxconv.data.synthetic.satisfaction.generator import (
    DISSATISFIED,
    HABITS,
    NOISE,
    SATISFIED,
    ceiling,
    conversations,
    word_list,
)

__all__ = ["DISSATISFIED", "HABITS", "NOISE", "SATISFIED", "ceiling", "conversations", "word_list"]
