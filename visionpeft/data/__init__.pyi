from .checking import check as check
from .converting import Conversion as Conversion
from .converting import convert as convert
from .report import Finding as Finding
from .report import Report as Report
from .report import Split as Split
