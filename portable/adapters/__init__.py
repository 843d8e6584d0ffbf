"""Adapters on any NNX model: LoRA, rsLoRA, DoRA, S2FT, ESFT; several by name, in one batch, exchanged with PEFT."""

from portable.adapters.batch import assign as assign
from portable.adapters.batch import dropping as dropping
from portable.adapters.config import AdapterConfig as AdapterConfig
from portable.adapters.config import DoRAConfig as DoRAConfig
from portable.adapters.config import ESFTConfig as ESFTConfig
from portable.adapters.config import LoRAConfig as LoRAConfig
from portable.adapters.config import S2FTConfig as S2FTConfig
from portable.adapters.defaults import default_targets as default_targets
from portable.adapters.defaults import expert_targets as expert_targets
from portable.adapters.lora_plus import labels as labels
from portable.adapters.lora_plus import lora_plus as lora_plus
from portable.adapters.peft_files import load_peft as load_peft
from portable.adapters.peft_files import save_peft as save_peft
from portable.adapters.surgery import activate as activate
from portable.adapters.surgery import active as active
from portable.adapters.surgery import adapter_names as adapter_names
from portable.adapters.surgery import apply as apply
from portable.adapters.surgery import disable as disable
from portable.adapters.surgery import forget as forget
from portable.adapters.surgery import merge as merge
from portable.adapters.surgery import refresh as refresh
from portable.adapters.surgery import remove as remove
from portable.adapters.variables import AdapterCache as AdapterCache
from portable.adapters.variables import AdapterParam as AdapterParam
from portable.adapters.variables import StoredParam as StoredParam
