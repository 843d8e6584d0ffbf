"""Every op and model on every device: run here, compiled ahead of time for the devices that this machine lacks."""

from portable.parity.estimates import estimate as estimate
from portable.parity.jobs import Job as Job
from portable.parity.jobs import Result as Result
from portable.parity.jobs import run as run
from portable.parity.programs import Program as Program
from portable.parity.targets import TARGETS as TARGETS
from portable.parity.targets import Target as Target
from portable.parity.targets import compile_for as compile_for
from portable.parity.targets import lower_for as lower_for
from portable.parity.targets import missing as missing
