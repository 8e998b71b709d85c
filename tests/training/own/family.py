"""Functions of a user that declare views, similarities, masks, entropies, options and advantages."""

from cppo.perception import needs, under


@under("removing", "preserving")
@needs("kl", "response_mask")
def sandwiched(anchor, removing, preserving, *, response_mask):
    apart = (removing.exact["kl"] - preserving.exact["kl"]).abs()
    most = apart.masked_fill(~response_mask, 0.0).amax(dim=1, keepdim=True)
    return apart / most.clamp(min=1e-6)


@under()
@needs("all_layers", "last_layer")
def near(anchor):
    return anchor.similarities["all_layers"] + 2 * anchor.similarities["last_layer"]


@needs("entropies", "options")
def uncertain(score, response_mask, top_fraction, *, entropies, options, **_):
    return response_mask & (entropies > options.perception_band[0]) & (score > -1)


@under()
@needs("advantages", "response_mean")
def kept(scores, options):
    return -scores.advantages[:, None] * scores.anchor.logps


@under("left")
def strange(anchor, left):
    return anchor.logps
