"Small folders and batches in the layouts of CIFAR, and label files for them."
import pickle, numpy as np, pytest, torch
from pathlib import Path
from PIL import Image
from fastai.vision.all import CategoryBlock, DataBlock, GrandparentSplitter, ImageBlock, get_image_files, parent_label
from fastai_jocor.blocks import NoisyCategoryBlock
from fastai_jocor.noise import Symmetric, cifar10_classes, cifar100_classes

def picture(rs, size=32, name=None):
    im = Image.fromarray(rs.randint(0, 256, (size,size,3), dtype=np.uint8))
    if name is not None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        im.save(name)
    return im

def make_cifar(root, classes=cifar10_classes, n_train=6, n_test=3, ext='png', parents=None):
    "`train/<class>/0000.png` and so on, of random pixels"
    rs = np.random.RandomState(0)
    for split,n in (('train',n_train),('test',n_test)):
        for c in classes:
            folder = Path(root)/split/(parents[c] if parents else '.')/c
            for i in range(n): picture(rs, name=folder/f'{i:04d}.{ext}')
    return Path(root)

def write_batches(root, images, labels, name='cifar10'):
    "torchvision's python batches, of our own images"
    d = Path(root)/('cifar-10-batches-py' if name=='cifar10' else 'cifar-100-python')
    d.mkdir(parents=True)
    rows,n = images.transpose(0,3,1,2).reshape(len(images), -1),len(images)//6
    def part(key, at): return {'data': rows[at], key: labels[at].tolist()}
    if name == 'cifar10':
        files = {f'data_batch_{i+1}': part('labels', slice(i*n, (i+1)*n)) for i in range(5)}
        files |= {'test_batch': part('labels', slice(5*n, None)), 'batches.meta': dict(label_names=cifar10_classes)}
    else:
        files = {'train': part('fine_labels', slice(5*n)), 'test': part('fine_labels', slice(5*n, None))}
        files |= {'meta': dict(fine_label_names=cifar100_classes)}
    for f,o in files.items(): (d/f).write_bytes(pickle.dumps(o))

def folder_block(noise=None, **kwargs):
    labels = CategoryBlock if noise is None else NoisyCategoryBlock(noise, 3)
    return DataBlock((ImageBlock, labels), get_items=lambda p: get_image_files(p).sorted(), get_y=parent_label,
                     splitter=GrandparentSplitter('train','test'), **kwargs)

@pytest.fixture(scope='module')
def c10(tmp_path_factory): return make_cifar(tmp_path_factory.mktemp('data')/'cifar10')

@pytest.fixture
def any_md5(monkeypatch):
    import torchvision.datasets.cifar as m
    monkeypatch.setattr(m, 'check_integrity', lambda path, md5=None: Path(path).exists())

@pytest.fixture
def human(tmp_path):
    "A label file for the folders of `make_cifar`, in a mixed order of classes as the original batches have"
    clean = np.random.RandomState(3).permutation(np.repeat(np.arange(10), 6))
    d = {'clean_label': clean}
    for name,rate in (('worse_label',.5), ('aggre_label',.2), ('random_label1',.3)):
        d[name] = Symmetric(rate).corrupt(clean, 10, 7)
    torch.save(d, tmp_path/'human.pt')
    return tmp_path/'human.pt',d

@pytest.fixture(scope='module')
def real(pytestconfig):
    "The folder of real data"
    import os
    path = pytestconfig.getoption('--data-path') or os.environ.get('FASTAI_JOCOR_DATA')
    if not path or not (Path(path)/'cifar10'/'train').is_dir():
        pytest.skip('no real CIFAR-10: pass --data-path, or set FASTAI_JOCOR_DATA, to the folder of cifar10/train')
    return Path(path)
