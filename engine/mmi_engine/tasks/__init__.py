"""What the generating commands differ in: how a row becomes pieces, and how filled pieces become a result.

``base`` holds the common types and the `Task` protocol, ``prompts`` and ``fields`` what several tasks use, and there is
one file per command. Nothing here imports torch.
"""

from mmi_engine.pieces import Piece
from mmi_engine.tasks.base import Job, Output, Panel, Task
from mmi_engine.tasks.caption import CaptionTask
from mmi_engine.tasks.ground import GroundTask
from mmi_engine.tasks.seg2img import Seg2ImgTask
from mmi_engine.tasks.story import StoryTask
from mmi_engine.tasks.t2i import Candidates, T2iTask
from mmi_engine.tasks.vqa import VqaTask

__all__ = [
    "Candidates",
    "CaptionTask",
    "GroundTask",
    "Job",
    "Output",
    "Panel",
    "Piece",
    "Seg2ImgTask",
    "StoryTask",
    "T2iTask",
    "Task",
    "VqaTask",
]
