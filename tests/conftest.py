import warnings
warnings.filterwarnings('ignore', message='.*torch.jit.*')
import pytest, torch
from hypothesis import settings

settings.register_profile('project', deadline=None, max_examples=60, derandomize=True)
settings.load_profile('project')

@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors are slower on several threads, and their sums depend on the number"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def pytest_addoption(parser):
    parser.addoption('--data-path', help='folder with real data: cifar10/train, cifar10/test, CIFAR-10_human.pt; also taken from FASTAI_JOCOR_DATA')
