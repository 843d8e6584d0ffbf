"""Training of language and image models: plain functions over data, a compiled step and a resumable loop.

    text = read_text("folder")                      # documents to train on, documents held out
    run = fit(model, text, TrainOptions(), "run")   # or continue the run in that folder

    images = read_images("folder")                  # a folder for each class, or read_digits()
    run = fit(model, ImageTask(images), TrainOptions(), "run")

    examples = read_examples("lines.jsonl", tokenizer)    # or text_examples(text, tokenizer)
    adapters.apply(model, config)
    run = fit(model, AdapterTask(examples, config), TrainOptions(), "run")    # trains the adapter alone

The parts are usable on their own: `Windows` and `Batches` (data), `make_step` (one compiled step),
`bits_per_byte`, `classify`.
"""

from portable.training.adapt import AdapterTask as AdapterTask
from portable.training.chat import ChatTemplate as ChatTemplate
from portable.training.classify import Classification as Classification
from portable.training.classify import ImageBatches as ImageBatches
from portable.training.classify import ImageOptions as ImageOptions
from portable.training.classify import ImageTask as ImageTask
from portable.training.classify import classify as classify
from portable.training.data import IGNORE as IGNORE
from portable.training.data import Batches as Batches
from portable.training.data import Windows as Windows
from portable.training.data import pack as pack
from portable.training.examples import Example as Example
from portable.training.examples import Examples as Examples
from portable.training.examples import read_examples as read_examples
from portable.training.examples import text_examples as text_examples
from portable.training.images import Images as Images
from portable.training.images import ImageSet as ImageSet
from portable.training.images import Preprocess as Preprocess
from portable.training.images import read_digits as read_digits
from portable.training.images import read_images as read_images
from portable.training.log import read_log as read_log
from portable.training.loop import Run as Run
from portable.training.loop import fit as fit
from portable.training.metrics import Score as Score
from portable.training.metrics import bits_per_byte as bits_per_byte
from portable.training.options import TrainOptions as TrainOptions
from portable.training.packing import Rows as Rows
from portable.training.packing import best_fit as best_fit
from portable.training.plot import accuracy_curves as accuracy_curves
from portable.training.plot import confusion_matrix as confusion_matrix
from portable.training.plot import loss_curve as loss_curve
from portable.training.progress import reporter as reporter
from portable.training.step import TrainState as TrainState
from portable.training.step import cross_entropy as cross_entropy
from portable.training.step import init_state as init_state
from portable.training.step import make_step as make_step
from portable.training.task import Task as Task
from portable.training.task import TextTask as TextTask
from portable.training.text import Document as Document
from portable.training.text import Text as Text
from portable.training.text import read_text as read_text
from portable.training.tokens import ByteTokenizer as ByteTokenizer
from portable.training.tokens import FileTokenizer as FileTokenizer
from portable.training.tokens import load_tokenizer as load_tokenizer
