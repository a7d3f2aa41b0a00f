"""All questions of the suite, by name."""

from importlib.util import find_spec

from . import ranks, scaling, training
from .cases import in_batch, info_nce, open_clip, rankpo, sentence_transformers
from .questions import Question
from .training import pretrained

ROOMS = [info_nce, in_batch, rankpo, sentence_transformers, open_clip]
if find_spec("triton") is not None:  # Linux
    from .cases import tiles

    ROOMS.append(tiles)
ROOMS += [training, pretrained, scaling, ranks]
QUESTIONS: dict[str, Question] = {q.name: q for room in ROOMS for q in room.QUESTIONS}
