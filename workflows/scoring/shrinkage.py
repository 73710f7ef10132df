"""Statistics of experts that saw few tokens lean on those of all experts of their block."""

from collections.abc import Sequence

from torch import Tensor

PRIOR = 0.25  # tokens for which the mean counts, as a share of the number of inputs


def shrink(grams: Sequence[Tensor], choices: int) -> None:
    """Adds to every expert's Gram what some tokens would add if they were like everybody's.

        G_e ← G_e + t · (Σ_e G_e / Σ_e n_e),    t = in / 4,    n_e the tokens that were routed to expert e

    The Gram of n tokens has at most rank n, so that below `in` tokens a solver would take directions for silent that
    merely were not met, and would empty an expert that nobody chose. So the mean Gram per token stands in as t more
    tokens: linear shrinkage (Ledoit & Wolf 2004) with the intensity t / (t + n_e) of a conjugate prior instead of an
    estimated one. An expert without tokens has the mean alone; one that was chosen 2 · `in` times leans on it by a
    ninth. The intensity that is best in the mean square belongs to a t near the inputs' effective rank, which is well
    below `in`; on a small trained mixture t from in/20 to in/4 did as well as none for experts that were seen, and in
    or more a little worse.

    The formula is linear in the Grams, given the number of choices; and that is known beforehand, tokens times experts
    per token, for a router drops none. So each shard shrinks its own part by its own part of the mean, with the number
    of choices in all shards, and the parts add up to the shrunk whole: nobody ever holds the Grams of all experts of
    all shards, and no pass is added. It costs one more Gram in memory. (The Grams themselves are what is large: 128
    experts of width 2048 and 768 inside have 2.0 GiB and 0.3 GiB of them in a block, in every worker.)

    Args:
        grams: of one kind of input of all experts of a block: [in, in] fp32, or their diagonals [in]; changed.
        choices: Σ_e n_e over all shards.
    """
    mean = grams[0].clone()
    for gram in grams[1:]:
        mean += gram
    mean *= PRIOR * mean.shape[-1] / choices
    for gram in grams:
        gram += mean
