import warnings
warnings.filterwarnings('ignore', message='.*torch.jit.*')
import random, numpy as np, pytest, torch
import matplotlib; matplotlib.use('agg')
from hypothesis import settings
import leaks

settings.register_profile('project', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('project')

def pytest_addoption(parser):
    parser.addoption('--data-path',
        help='folder with real data: cifar10/train, cifar10/test, CIFAR-10_human.pt; also taken from FASTAI_JOCOR_DATA')
    parser.addoption('--seed', type=int, default=0, help='seed of the random states with which every test begins')

@pytest.fixture(scope='session', autouse=True)
def all_modules(): leaks.import_all()

@pytest.fixture(autouse=True)
def own_process(request):
    "Each test begins with the same random states and one thread, and what it changes in the process is put back"
    with leaks.nothing_leaks():
        seed = request.config.getoption('--seed')
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(1)    # small tensors are slower on several threads, and their sums depend on the number
        yield
