from .comparison import Row as Row
from .comparison import compare as compare
from .comparison import markdown as markdown
from .comparison import table as table
from .results import read as read
from .sweep import run as run
