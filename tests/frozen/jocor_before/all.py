from .losses import *
from .selection import *
from .peers import *
from .noise import *
from .data import *
from .callback import *
from .methods import *
from .audit import *
