from .checking import check as check
from .converting import Conversion as Conversion
from .converting import convert as convert
from .report import CheckReport as CheckReport
from .report import Finding as Finding
from .report import Split as Split
