import warnings
warnings.filterwarnings('ignore', message='.*torch.jit.*')
import os
DEVICE = os.environ.get('FASTAI_JOCOR_DEVICE', 'cpu')
if DEVICE == 'cpu': os.environ['CUDA_VISIBLE_DEVICES'] = ''     # before torch looks for a GPU, and for subprocesses
import random, numpy as np, pytest, torch
from contextlib import nullcontext
from fastai.torch_core import default_device
import matplotlib; matplotlib.use('agg')
from hypothesis import settings
import leaks

settings.register_profile('project', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('project')

def pytest_addoption(parser):
    parser.addoption('--data-path',
        help='folder with real data: cifar10/train, cifar10/test, CIFAR-10_human.pt; also taken from FASTAI_JOCOR_DATA')
    parser.addoption('--seed', type=int, default=0, help='seed of the random states with which every test begins')

PURE = 'test_losses','test_selection','test_peers'  # their tensors are made by torch alone, on its default device

def default_of(module):
    "The device on which the tests of a module make their tensors; learners train on `DEVICE` in any case"
    return torch.device(DEVICE) if module in PURE and DEVICE != 'cpu' else nullcontext()

@pytest.fixture(scope='session', autouse=True)
def all_modules(tmp_path_factory):
    default_device(DEVICE == 'cuda')
    leaks.import_all()
    cache = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch: # no test writes into the user's cache
        patch.setattr('fastai_jocor.features.xdg_cache_home', lambda: cache)
        yield

@pytest.fixture(autouse=True)
def own_process(request):
    "Each test begins with the same random states and one thread, and what it changes in the process is put back"
    with leaks.nothing_leaks(), default_of(request.module.__name__):
        seed = request.config.getoption('--seed')
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(1)    # small tensors are slower on several threads, and their sums depend on the number
        yield
