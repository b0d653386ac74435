import os, pickle, subprocess, sys, numpy as np, pandas as pd, pytest, torch
from pathlib import Path
from PIL import Image
from hypothesis import given, strategies as st
from fastai.vision.all import (CategoryBlock, ClassificationInterpretation, DataBlock, DataLoaders, FlipItem, GrandparentSplitter, ImageBlock, IndexSplitter, Learner, TransformBlock, MultiCategoryBlock, Normalize, RandomSplitter,
    RegressionBlock, Resize, TfmdDL, accuracy, cifar_stats, first, get_image_files, load_learner, nn, parent_label, warnings)
from fastai_jocor.noise import *
from fastai_jocor.instance import *
from fastai_jocor.human import *
from fastai_jocor.blocks import *
from fastai_jocor.lab.store import *
from fastai_jocor.lab.data import *
from fastai_jocor.lab.datasets import *
from fastai_jocor.noise import cifar10_classes, cifar100_classes, cifar100_superclasses

def picture(rs, size=32, name=None, value=None):
    im = Image.fromarray(rs.randint(0, 256, (size,size,3), dtype=np.uint8) if value is None else np.full((size,size,3), value, np.uint8))
    if name is not None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        im.save(name)
    return im

def make_cifar(root, classes, n_train=6, n_test=3, ext='png', start=0, parents=None):
    rs = np.random.RandomState(0)
    for split,n in (('train',n_train),('test',n_test)):
        for c in classes:
            for i in range(n): picture(rs, name=Path(root)/split/(parents[c] if parents else '.')/c/f'{i+start:04d}.{ext}')
    return Path(root)

@pytest.fixture(scope='module')
def c10(tmp_path_factory): return make_cifar(tmp_path_factory.mktemp('data')/'cifar10', cifar10_classes)

@pytest.fixture
def human(tmp_path):
    "A label file for the folders of `make_cifar`, in a mixed order of classes as the original batches have"
    clean = np.random.RandomState(3).permutation(np.repeat(np.arange(10), 6))
    d = {'clean_label': clean, **{f'{k}_label{i}': Symmetric(r).corrupt(clean, 10, 7) for k,i,r in (('worse','',.5),('aggre','',.2),('random',1,.3))}}
    torch.save(d, tmp_path/'human.pt')
    return tmp_path/'human.pt',d

# the layouts of CIFAR

@pytest.mark.parametrize('ext', ('png','jpg'))
def test_cifar10_folders(tmp_path, ext):
    root = make_cifar(tmp_path/'cifar10', cifar10_classes, ext=ext)
    for path in (root, tmp_path):
        dls = cifar10_dls(path, noise='symmetric:0.5', seed=2, bs=16, progress=False)
        assert (len(dls.train_ds), len(dls.valid_ds), dls.c, list(dls.vocab)) == (60, 30, 10, cifar10_classes)
    xs = torch.cat([b[0] for b in dls.valid])
    for i in (0, 17, 29):
        f = root/'test'/cifar10_classes[i//3]/f'{i%3:04d}.{ext}'
        torch.testing.assert_close(xs[i].as_subclass(torch.Tensor), torch.tensor(np.asarray(Image.open(f))).permute(2,0,1)/255.)
    assert torch.cat([b[1] for b in dls.valid]).tolist() == [i//3 for i in range(30)]
    assert dls.noise.true.tolist() == [i//6 for i in range(60)] and .2 < dls.noise.rate < .8

def test_cifar100_folders_with_superclasses(tmp_path):
    parents = {c: s for s,cs in cifar100_superclasses.items() for c in cs}
    make_cifar(tmp_path/'cifar100', cifar100_classes, 3, 1, parents=parents)
    dls = cifar100_dls(tmp_path, noise='asymmetric:1.0', bs=8, progress=False)
    assert dls.c == 100 and dls.noise.rate == 1. and (len(dls.train_ds), len(dls.valid_ds)) == (300, 100)
    for a,b in zip(dls.noise.table.true, dls.noise.table.noisy): assert parents[a] == parents[b] and a != b
    official = cifar100_dls(tmp_path, noise='asymmetric:1.0:cifar100_official', progress=False).noise
    assert (official.noisy == official.true//5*5 + (official.true+1)%5).all()
    assert sum(parents[a]==parents[b] for a,b in zip(official.table.true[::3], official.table.noisy[::3])) == 6

def write_batches(root, images, labels, name='cifar10'):
    "torchvision's python batches, of our own images"
    d = Path(root)/('cifar-10-batches-py' if name=='cifar10' else 'cifar-100-python')
    d.mkdir(parents=True)
    rows = images.transpose(0,3,1,2).reshape(len(images), -1)
    key = 'labels' if name=='cifar10' else 'fine_labels'
    n = len(images)//6
    parts = [f'data_batch_{i}' for i in range(1,6)]+['test_batch'] if name=='cifar10' else None
    if parts: files = {p: dict(data=rows[i*n:(i+1)*n], labels=labels[i*n:(i+1)*n].tolist()) for i,p in enumerate(parts)}
    else: files = {'train': dict(data=rows[:5*n], fine_labels=labels[:5*n].tolist()), 'test': dict(data=rows[5*n:], fine_labels=labels[5*n:].tolist())}
    meta = dict(label_names=cifar10_classes) if name=='cifar10' else dict(fine_label_names=cifar100_classes)
    for p,o in {**files, ('batches.meta' if name=='cifar10' else 'meta'): meta}.items(): (d/p).write_bytes(pickle.dumps(o))

@pytest.fixture
def any_md5(monkeypatch):
    import torchvision.datasets.cifar as m
    monkeypatch.setattr(m, 'check_integrity', lambda path, md5=None: Path(path).exists())

@pytest.mark.parametrize('f,name,c', ((cifar10_dls,'cifar10',10), (cifar100_dls,'cifar100',100)))
def test_torchvision_batches(tmp_path, any_md5, f, name, c):
    rs = np.random.RandomState(1)
    images,labels = rs.randint(0, 256, (1200,32,32,3), dtype=np.uint8),np.tile(rs.permutation(c), 1200//c)
    write_batches(tmp_path, images, labels, name)
    for path in (tmp_path, tmp_path/('cifar-10-batches-py' if c==10 else 'cifar-100-python')):
        dls = f(path, noise='symmetric:0.4', seed=5)
        assert (len(dls.train_ds), len(dls.valid_ds)) == (1000, 200) and list(dls.vocab) == (cifar10_classes if c==10 else cifar100_classes)
    assert dls.noise.true.tolist() == labels[:1000].tolist()
    assert (np.asarray(dls.valid_ds[7][0]) == images[1007]).all() and int(dls.valid_ds[7][1]) == labels[1007]

def test_both_layouts_give_an_item_the_same_label(tmp_path, any_md5, c10):
    order = np.random.RandomState(4).permutation(np.repeat(np.arange(10), 6))
    place = pd.Series(order).groupby(order).cumcount()
    read = lambda f: np.asarray(Image.open(f))
    images = np.stack([read(c10/'train'/cifar10_classes[c]/f'{i:04d}.png') for c,i in zip(order,place)] + [read(c10/'test'/'cat'/'0000.png')]*12)
    write_batches(tmp_path, images, np.concatenate([order, [3]*12]))
    for noise in ('symmetric:0.5', 'instance:0.4', 'asymmetric:0.5'):
        a,b = [cifar10_dls(p, noise=noise, seed=1, progress=False).noise.table.set_index('item') for p in (c10, tmp_path)]
        assert a.loc[b.index].equals(b) and a.flipped.any()

def test_no_cifar_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path/'cifar10')) as e: cifar10_dls(tmp_path)
    assert 'cifar-10-batches-py' in str(e.value) and 'download=True' in str(e.value)
    with pytest.raises(FileNotFoundError, match='no MNIST found'): mnist_dls(tmp_path)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('f,cls', ((cifar10_dls,'CIFAR10'),(mnist_dls,'MNIST')))
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, f, cls):
    import torchvision.datasets as tvd, urllib.error
    def broken(self):
        (Path(self.root)/'half.tar.gz').write_text('half')
        raise urllib.error.URLError('no network')
    monkeypatch.setattr(getattr(tvd, cls), 'download', broken)
    with pytest.raises(FileNotFoundError, match='the download failed: .*no network') as e: f(tmp_path/'new', download=True)
    assert str(tmp_path/'new') in str(e.value)
    assert list((tmp_path/'new').iterdir()) == []

def test_a_download_mends_a_folder_that_is_not_whole(tmp_path, monkeypatch, any_md5):
    import torchvision.datasets as tvd
    images = np.random.RandomState(0).randint(0, 256, (120,32,32,3), dtype=np.uint8)
    write_batches(tmp_path, images, np.arange(120)%10)
    (tmp_path/'cifar-10-batches-py'/'data_batch_3').unlink()
    with pytest.raises(FileNotFoundError, match='no cifar10 found'): cifar10_dls(tmp_path)
    monkeypatch.setattr(tvd.CIFAR10, 'download', lambda self: write_batches(self.root, images, np.arange(120)%10))
    assert len(cifar10_dls(tmp_path, download=True).train_ds) == 100 and len(cifar10_dls(tmp_path).train_ds) == 100

def test_masks_names_and_overlaps():
    X,y = np.zeros((40,8,8), np.uint8),np.arange(40)%4
    mask = np.arange(40) >= 30
    a = InMemoryDataLoaders.from_arrays(X, y, valid=mask, noise='symmetric:0.5', bs=8)
    b = InMemoryDataLoaders.from_arrays(X, np.array(list('abcd'))[y], valid=range(30,40), train=~mask, noise='symmetric:0.5', bs=8)
    assert a.valid.pos.tolist() == b.valid.pos.tolist() == list(range(30,40)) and b.train.pos.tolist() == list(range(30))
    assert b.vocab == ['a','b','c','d'] and (a.noise.noisy == b.noise.noisy).all() and a.noise.flipped.any()
    with pytest.raises(ValueError, match='test holds 5 of the training items'): InMemoryDataLoaders.from_arrays(X, y, train=range(20), valid=range(20,30), test=range(15,40))
    with pytest.raises(ValueError, match='mask of 40'): InMemoryDataLoaders.from_arrays(X, y, valid=mask[:9])

def test_a_download_lands_in_place(tmp_path, monkeypatch, any_md5):
    import torchvision.datasets as tvd
    images = np.random.RandomState(0).randint(0, 256, (120,32,32,3), dtype=np.uint8)
    monkeypatch.setattr(tvd.CIFAR10, 'download', lambda self: write_batches(self.root, images, np.arange(120)%10))
    assert len(cifar10_dls(tmp_path/'new', download=True).train_ds) == 100
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['cifar-10-batches-py']
    assert len(cifar10_dls(tmp_path/'new').train_ds) == 100

# options

def test_valid_subset_and_the_third_loader(c10):
    whole = cifar10_dls(c10, noise='symmetric:0.5', progress=False)
    part = cifar10_dls(c10, noise='symmetric:0.5', subset=.5, valid=1/3, bs=4, progress=False)
    assert [len(dl.dataset) for dl in part.loaders] == [20,10,15]
    assert np.bincount(part.noise.true).tolist() == [2]*10 and np.bincount(torch.cat([b[1] for b in part[1]]).tolist()).tolist() == [1]*10
    given = whole.noise.table.set_index('item').noisy
    assert part.noise.table.noisy.tolist() == given[part.noise.table.item].tolist()
    again = cifar10_dls(c10, noise='symmetric:0.5', seed=9, subset=30, valid=1/3, progress=False)
    assert (again.train.pos == part.train.pos).all() and again.noise.table.noisy.tolist() != part.noise.table.noisy.tolist()
    learn = Learner(part, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,10)), metrics=accuracy)
    with learn.no_bar(): assert len(learn.get_preds(ds_idx=2)[0]) == 15

def test_augment(c10):
    plain,aug = [cifar10_dls(c10, augment=a, normalize=True, bs=32, progress=False, device='cpu') for a in (None,'crop_flip')]
    for (a,_),(b,_) in zip(plain.valid, aug.valid): torch.testing.assert_close(a, b)
    back = first(plain.valid)[0].as_subclass(torch.Tensor)*torch.tensor(cifar_stats[1])[:,None,None] + torch.tensor(cifar_stats[0])[:,None,None]
    torch.testing.assert_close(back[0], torch.tensor(np.asarray(Image.open(c10/'test'/'airplane'/'0000.png'))).permute(2,0,1)/255.)
    x = [first(aug.train.new(shuffle=False))[0] for _ in range(2)]
    assert (x[0] != x[1]).any()
    black = torch.tensor([-m/s for m,s in zip(*cifar_stats)])
    assert torch.isclose(x[0].as_subclass(torch.Tensor)[:,:,0,:], black[:,None]).all(1).any()
    assert [type(t).__name__ for t in cifar10_dls(c10, augment=[Normalize.from_stats(*cifar_stats)], progress=False).train.after_batch.fs] == ['BytesToFloat','Normalize']

@given(seed=st.integers(0,2**31), pad=st.integers(0,5), n=st.integers(1,6), c=st.sampled_from((1,3)), hw=st.tuples(st.integers(2,9),st.integers(2,9)), last=st.booleans(), kind=st.sampled_from((torch.uint8,torch.float32)))
def test_crop_flip_is_a_shift_of_each_image(seed, pad, n, c, hw, last, kind):
    torch.manual_seed(seed)
    x = torch.randint(1, 250, (n,c,*hw)).to(kind)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    out = crop_flip(x, pad)
    assert out.shape == x.shape and out.dtype == x.dtype
    for a,o in zip(x, out):
        p = np.pad(a.numpy(), ((0,0),(pad,pad),(pad,pad)))
        p = [p, np.pad(a.flip(-1).numpy(), ((0,0),(pad,pad),(pad,pad)))]
        assert any((q[:,i:i+hw[0],j:j+hw[1]] == o.numpy()).all() for q in p for i in range(2*pad+1) for j in range(2*pad+1))

def test_crop_flip_draws_every_shift_alike():
    torch.manual_seed(0)
    x = torch.arange(1,26).reshape(1,1,5,5).expand(18000,-1,-1,-1)
    out = crop_flip(x, 1)[:,0]
    centre,right = out[:,2,2],out[:,2,3]
    flipped = right < centre
    assert abs(flipped.float().mean()-.5) < .02
    counts = torch.stack([torch.bincount(centre[flipped==f], minlength=26) for f in (False,True)])
    shifts = counts[counts>0]
    assert len(shifts) == 18 and (shifts-1000).abs().max() < 160

# the loader in memory

def folder_block(noise=None, **kwargs):
    return DataBlock((ImageBlock, CategoryBlock if noise is None else NoisyCategoryBlock(noise, 3)), get_items=lambda p: get_image_files(p).sorted(), get_y=parent_label, splitter=GrandparentSplitter('train','test'), **kwargs)

@pytest.mark.parametrize('workers', (0,2))
def test_from_dls_gives_the_same_batches(c10, workers):
    slow = folder_block('symmetric:0.5').dataloaders(c10, bs=16, num_workers=0, device='cpu')
    fast = InMemoryDataLoaders.from_dls(slow, n_workers=workers, progress=False)
    assert isinstance(fast.train, MemoryDL) and isinstance(fast, DataLoaders) and fast.c == 10 and fast.vocab == slow.vocab
    for i in (0,1):
        for a,b in zip(slow[i].new(shuffle=False), fast[i].new(shuffle=False)):
            assert [type(o) for o in a] == [type(o) for o in b]
            for p,q in zip(a,b): torch.testing.assert_close(p, q)
    assert (fast.noise.noisy == slow.noise.noisy).all() and fast.noise.flipped.any()
    orders = [torch.cat([b[1] for b in fast.train]).tolist() for _ in range(2)]
    assert orders[0] != orders[1] and len(orders[0]) == 48
    f = slow.train_ds.items[4]
    for dl in (slow.test_dl([f,f]), fast.test_dl([f,f])): torch.testing.assert_close(first(dl)[0][0], fast.train.new(shuffle=False).one_batch()[0][4])

def test_from_dls_of_many_kinds(c10, tmp_path):
    files = get_image_files(c10/'train').sorted()
    many = DataBlock((ImageBlock, MultiCategoryBlock), get_items=lambda _: files, get_y=lambda f: [parent_label(f), f.stem])
    number = DataBlock((ImageBlock, RegressionBlock), get_items=lambda _: files, get_y=lambda f: float(f.stem))
    rows = pd.DataFrame(dict(f=[str(f) for f in files], y=[f.parent.name for f in files]))
    frame = DataBlock((ImageBlock, CategoryBlock), get_x=lambda r: r.f, get_y=lambda r: r.y, splitter=RandomSplitter(seed=0))
    for block,src in ((many,c10),(number,c10),(frame,rows)):
        slow = block.dataloaders(src, bs=8, num_workers=0, device='cpu')
        fast = InMemoryDataLoaders.from_dls(slow, n_workers=0, progress=False)
        for p,q in zip(first(slow.valid), first(fast.valid)): torch.testing.assert_close(p, q)

def test_resize_is_taken_from_the_middle(tmp_path):
    rs = np.random.RandomState(0)
    for c in 'ab':
        for i in range(4): picture(rs, 20, tmp_path/c/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=IndexSplitter([0]), item_tfms=Resize((20,12)))
    dls = InMemoryDataLoaders.from_dls(block.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu'), progress=False)
    im = np.asarray(Image.open(dls.train_ds.items[3]))
    assert (dls.train.store.images[3].numpy() == im[:,4:16]).all()

def test_an_ordinary_learner(c10, tmp_path):
    dls = InMemoryDataLoaders.from_dls(folder_block('symmetric:0.2').dataloaders(c10, bs=16, num_workers=0), progress=False)
    learn = Learner(dls, jocor_cnn(10), metrics=accuracy, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        ClassificationInterpretation.from_learner(learn).plot_top_losses(4)
        ours = Learner(InMemoryDataLoaders.from_arrays(np.zeros((40,16,16,3), np.uint8), np.arange(40)%10, valid=.5, bs=8), learn.model)
        ClassificationInterpretation.from_learner(ours).plot_top_losses(4)
        want = learn.predict(dls.valid_ds.items[2])
        preds = learn.get_preds(dl=dls.test_dl(dls.valid_ds.items))[0]
        torch.testing.assert_close(preds, learn.get_preds()[0])
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    assert (tmp_path/'export.pkl').stat().st_size < 60*3072 + 4*sum(p.numel() for p in learn.model.parameters())
    with loaded.no_bar(): got = loaded.predict(dls.valid_ds.items[2])
    assert got[0] == want[0]
    torch.testing.assert_close(got[2], want[2])
    assert (loaded.dls.noise.noisy == dls.noise.noisy).all()

def test_new_loaders_keep_or_leave_the_store(c10):
    dls = cifar10_dls(c10, bs=16, progress=False)
    small = dls.train.new(bs=4)
    assert isinstance(small, MemoryDL) and small.store is dls.train.store is dls.valid.store and len(first(small)[0]) == 4
    assert type(dls.train.new(dls.valid_ds.new_empty())) is TfmdDL
    few = dls.train.new(n=8, drop_last=False)
    assert sum(len(b[0]) for b in few) == 8

def test_batches_are_channels_last_and_the_array_is_not_copied():
    X = np.random.RandomState(0).randint(0, 256, (50,8,8,3), dtype=np.uint8)
    dls = InMemoryDataLoaders.from_arrays(X, np.arange(50)%2, bs=8, device='cpu')
    x,_ = dls.one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert np.shares_memory(dls.train.store.images.numpy(), X)
    chw = InMemoryDataLoaders.from_arrays(X.transpose(0,3,1,2), np.arange(50)%2, bs=8, device='cpu')
    torch.testing.assert_close(first(chw.valid)[0], first(dls.valid)[0])

def test_the_tensor_moves_to_the_device_only_where_it_fits(monkeypatch):
    import fastai_jocor.lab.store as m
    store = ImageStore(np.zeros((4,8,8), np.uint8), [0,1,0,1])
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (600,1000))
    assert m._fits(300, torch.device('cuda:0')) and not m._fits(301, torch.device('cuda:0'))
    assert m._fits(10**12, torch.device('cpu')) and not m._fits(1, torch.device('meta'))
    monkeypatch.setattr(m, '_fits', lambda n,d: True)
    store.to('meta')
    assert store.images.device.type == store.targets.device.type == 'meta' and store.batch(torch.tensor([0,1]))[0].device.type == 'meta'

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs the peak of memory of Linux')
@pytest.mark.parametrize('kw', ('', 'normalize=([.5]*3,[.2]*3)', 'batch_tfms=CropFlip()', 'batch_tfms=CropFlip(), normalize=([.5]*3,[.2]*3)'), ids=('plain','normalise','crop','both'))
def test_memory_of_an_epoch(kw):
    "In a process of its own: beside the tensor of bytes, the peak is that of about two batches, the one in use and the one that is made"
    code = f'''
import numpy as np, torch
from fastai_jocor.lab.store import CropFlip
from fastai_jocor.lab.data import *
torch.set_num_threads(1)
now = lambda key: int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(key)))/1024
make = lambda n, bs: InMemoryDataLoaders.from_arrays(np.full((n,64,64,3), 7, np.uint8), np.arange(n)%2, bs=bs, val_bs=bs, device='cpu', {kw})
for b in make(300, 20).train: pass
dls = make(6000, 1000)
del b
before = now('VmRSS')
open('/proc/self/clear_refs','w').write('5')
for b in dls.train: pass
print((now('VmHWM')-before)/(1000*64*64*3*4/2**20), before)
'''
    out = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'})
    batches,before = map(float, out.stdout.split())
    assert 1 < batches < 2.8, out.stdout+out.stderr

# what cannot be

def test_corrupt_images_are_named_and_counted(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes)
    (tmp_path/'c'/'train'/'cat'/'0002.png').write_bytes(b'no image')
    full = (tmp_path/'c'/'train'/'dog'/'0001.png').read_bytes()
    (tmp_path/'c'/'train'/'dog'/'0001.png').write_bytes(full[:len(full)//2])
    with pytest.raises(ValueError, match=r'0002.png cannot be read as an image .*, and 1 others'): cifar10_dls(tmp_path/'c', progress=False)
    with pytest.raises(ValueError, match=r'0002.png cannot be read .*, and 1 others'):
        InMemoryDataLoaders.from_dls(folder_block().dataloaders(tmp_path/'c', num_workers=0), progress=False)
    with pytest.raises(ValueError, match=r'0002.png cannot be read as an image'): folder_block(InstanceDependent(.9)).datasets(tmp_path/'c')

def test_unequal_sizes_are_named(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes)
    picture(np.random.RandomState(0), 20, tmp_path/'c'/'train'/'cat'/'0002.png')
    with pytest.raises(ValueError, match=r'cat.0002.png has shape \(20, 20\), most have \(32, 32\); 1 of 90'): cifar10_dls(tmp_path/'c', progress=False)
    with pytest.raises(ValueError, match=r'0002.png has shape \(3, 20, 20\), most have'): InMemoryDataLoaders.from_dls(folder_block().dataloaders(tmp_path/'c', num_workers=0), progress=False)
    with pytest.raises(ValueError, match='images must be of one size'): folder_block(InstanceDependent(.9)).datasets(tmp_path/'c')

def test_a_validation_set_of_another_size(tmp_path):
    rs = np.random.RandomState(0)
    for split,size in (('train',16),('test',20)):
        for c in 'ab':
            for i in range(3): picture(rs, size, tmp_path/split/c/f'{i}.png')
    with pytest.raises(ValueError, match='images must be of one size'): InMemoryDataLoaders.from_dls(folder_block().dataloaders(tmp_path, bs=2, num_workers=0), progress=False)

def test_missing_classes(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes[:-1])
    with pytest.raises(ValueError, match='each of 10 classes.*train has 9, test has 9; missing in train: truck'): cifar10_dls(tmp_path/'c')
    with pytest.raises(ValueError, match='each of 100 classes'): cifar100_dls(tmp_path/'c')

@pytest.mark.parametrize('kw,msg', [(dict(subset=1.5),'subset=1.5'), (dict(subset=True),'subset=True'), (dict(subset=5),'subset=5'), (dict(valid='train'),"valid='train'"), (dict(valid=.01),'valid=0.01'),
    (dict(augment='mixup'),"augment='mixup'"), (dict(noise='symmetric:2'),'rate=2.0'), (dict(noise='symmetric:0.001:exact'),'cannot reach its rate')])
def test_bad_options(c10, kw, msg):
    with pytest.raises(ValueError, match=msg): cifar10_dls(c10, progress=False, **kw)

@pytest.mark.parametrize('tfm', (FlipItem(), lambda: None), ids=('random','before'))
def test_loaders_that_cannot_be_held(c10, tfm):
    kw = dict(item_tfms=tfm) if isinstance(tfm, FlipItem) else {}
    dls = folder_block(**kw).dataloaders(c10, num_workers=0, bs=8, **({} if kw else dict(before_batch=lambda b: b)))
    with pytest.raises(ValueError, match='FlipItem' if kw else 'before they are collated'): InMemoryDataLoaders.from_dls(dls, progress=False)

def test_from_dls_wants_images():
    dls = DataBlock((CategoryBlock, CategoryBlock), get_x=lambda o: o%3, get_y=lambda o: o%2).dataloaders(range(60), bs=4, num_workers=0)
    with pytest.raises(ValueError, match='images'): InMemoryDataLoaders.from_dls(dls, progress=False)

@given(seed=st.integers(0,2**31), n=st.integers(20,200), c=st.integers(2,4), share=st.floats(.25,.75))
def test_a_stratified_part(seed, n, c, share):
    y = np.concatenate([np.arange(c), np.arange(c), np.random.RandomState(seed).randint(0, c, n)])
    taken,rest = stratified(y, share)
    assert len(taken) == round(share*len(y)) and sorted([*taken,*rest]) == list(range(len(y)))
    for i in range(c): assert abs((y[taken]==i).sum() - share*(y==i).sum()) < 2

# human labels

def test_human_labels_of_folders(c10, human, tmp_path):
    file,d = human
    place = {c: np.flatnonzero(d['clean_label']==c) for c in range(10)}
    for which in ('worse','aggre','random1'):
        key = {'random1': 'random_label1'}.get(which, f'{which}_label')
        dls = cifar10_dls(c10, noise=HumanLabels(file, which), progress=False)
        want = [d[key][place[c][i]] for c in range(10) for i in range(6)]
        assert dls.noise.noisy.tolist() == want and dls.noise.rate == (d[key]!=d['clean_label']).mean() == dls.noise.noise_rate
        assert cifar10_dls(c10, noise=f'human:{which}:{file}', progress=False).noise.noisy.tolist() == want
    block = folder_block(HumanLabels(file, 'random1')).datasets(c10)
    assert {f'{f.parent.name}/{f.name}': int(y) for f,y in zip(block.train.items, block.train.tls[1])} == \
           {f'{cifar10_classes[c]}/{i:04d}.png': d['random_label1'][place[c][i]] for c in range(10) for i in range(6)}
    assert all(cifar10_classes[int(y)] == f.parent.name for f,y in zip(block.valid.items, block.valid.tls[1]))
    part = cifar10_dls(c10, noise=HumanLabels(file, 'worse'), subset=.5, progress=False).noise.table.set_index('item').noisy
    whole = cifar10_dls(c10, noise=HumanLabels(file, 'worse'), progress=False).noise.table.set_index('item').noisy
    assert part.equals(whole[part.index])

def test_human_labels_of_batches_and_rows(tmp_path, any_md5, human):
    file,d = human
    images = np.random.RandomState(0).randint(0, 256, (72,32,32,3), dtype=np.uint8)
    write_batches(tmp_path, images, np.concatenate([d['clean_label'], np.arange(12)%10]))
    assert cifar10_dls(tmp_path, noise=HumanLabels(file,'worse')).noise.noisy.tolist() == d['worse_label'].tolist()

def test_names_without_a_number(tmp_path, human):
    root = make_cifar(tmp_path/'cifar10', cifar10_classes)
    for f in (root/'train').rglob('*.png'): f.rename(f.parent/f'a_7_{f.name}')
    with pytest.raises(ValueError, match='no number in its name, or several'): cifar10_dls(root, noise=HumanLabels(human[0], 'worse'), progress=False)
    assert cifar10_dls(root, noise='symmetric:0.5', progress=False).noise.table.item[0] == 'airplane/a_7_0000.png'
    for f in (root/'train'/'cat').glob('*.png'): f.rename(f.parent/(f.stem[-4:]+'.png'))
    (root/'train'/'cat'/'0001.png').rename(root/'train'/'cat'/'2.png')
    files = sorted((root/'train'/'cat').glob('*.png'))
    with pytest.raises(ValueError, match='several items have the same number'): HumanLabels(human[0], 'worse').corrupt([3]*6, cifar10_classes, keys=[f'cat/{f.name}' for f in files])

def test_plain_targets_and_bad_ones(c10):
    files = get_image_files(c10/'train').sorted()
    slow = DataBlock((ImageBlock, TransformBlock), get_items=lambda _: files, get_y=lambda f: int(f.stem)%2).dataloaders(c10, bs=4, num_workers=0, device='cpu')
    fast = InMemoryDataLoaders.from_dls(slow, n_workers=0, progress=False)
    assert first(fast.valid)[1].tolist() == first(slow.valid)[1].tolist()
    uneven = DataBlock((ImageBlock, TransformBlock), get_items=lambda _: files, get_y=lambda f: torch.zeros(1+int(f.stem)%2)).dataloaders(c10, bs=1, num_workers=0)
    with pytest.raises(ValueError, match='targets must be of one shape'): InMemoryDataLoaders.from_dls(uneven, n_workers=0, progress=False)
    with pytest.raises(ValueError, match='of 3 channels'): InMemoryDataLoaders.from_arrays(np.zeros((20,8,8,3), np.uint8), np.arange(20)%2, normalize=([.1,.2],[.1,.2]))

def test_bad_items_are_counted_over_all_loaders(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes)
    dls = folder_block().dataloaders(tmp_path/'c', num_workers=0, bs=8)
    for f in ('train/cat/0003.png','test/dog/0001.png'): (tmp_path/'c'/f).write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'0003.png cannot be read .*, and 1 others'): InMemoryDataLoaders.from_dls(dls, progress=False)

def test_a_part_smaller_than_a_batch_and_both_transforms(c10):
    dls = cifar10_dls(c10, subset=20, bs=128, augment='crop_flip', batch_tfms=[Normalize.from_stats(*cifar_stats)], progress=False)
    assert len(dls.train) == 1 and {'CropFlip','Normalize'} <= {type(t).__name__ for t in dls.train.after_batch.fs}

def test_images_of_16_bits_are_refused(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes)
    Image.fromarray((np.arange(1024).reshape(32,32)*60).astype(np.uint16)).save(tmp_path/'c'/'train'/'cat'/'0002.png')
    with pytest.raises(ValueError, match='more than 8 bits'): cifar10_dls(tmp_path/'c', progress=False)

def test_how_files_are_numbered(human):
    file,d = human
    clean,h = d['clean_label'],HumanLabels(file, 'worse')
    place = pd.Series(clean).groupby(clean).cumcount()
    name = [cifar10_classes[c] for c in clean]
    for keys in ([f'{n}/{i:04d}.png' for n,i in zip(name,place)], [f'{n}/{i+1}.png' for n,i in zip(name,place)], [f'{n}/cifar10_{i}.png' for n,i in zip(name,place)], [f'{n}/{n}{i}.png' for n,i in zip(name,place)],
                 [f'{n}/{i}_{n}.png' for i,n in enumerate(name)], [f'{n}/{i+1}_{n}.png' for i,n in enumerate(name)], list(range(60))):
        assert (h.corrupt(clean, cifar10_classes, keys=keys) == d['worse_label']).all(), keys[:3]
    few = [f'{n}/{i}_{n}.png' for i,n in enumerate(name)][:20]
    assert (h.corrupt(clean[:20], cifar10_classes, keys=few) == d['worse_label'][:20]).all()
    with pytest.raises(ValueError, match='take more items'): h.corrupt(clean[:2], cifar10_classes, keys=few[:2])
    with pytest.raises(ValueError, match='no number in its name, or several'): h.corrupt(clean[:1], cifar10_classes, keys=['cat/1_2.png'])
    one = HumanLabels(file, 'worse', start=1)
    ranks = [f'{n}/{i}' for n,i in zip(name,place)]
    assert (one.corrupt(clean, cifar10_classes, keys=ranks) == d['worse_label']).all()
    with pytest.raises(ValueError, match='lies outside'): one.corrupt(clean, cifar10_classes, keys=[r+'.png' for r in ranks])

def test_a_label_file_that_does_not_fit(c10, human, tmp_path):
    file,d = human
    torch.save({**d, 'clean_label': d['clean_label'][::-1].copy()}, tmp_path/'order.pt')
    with pytest.raises(ValueError, match='have another class in the file'): HumanLabels(tmp_path/'order.pt', 'worse').corrupt(d['clean_label'], 10)
    torch.save({k: v[:50] for k,v in d.items()}, tmp_path/'short.pt')
    with pytest.raises(ValueError, match='does not fit'): cifar10_dls(c10, noise=HumanLabels(tmp_path/'short.pt', 'worse'), progress=False)
    torch.save({k: np.arange(300)%100 for k in ('clean_label','noisy_label')}, tmp_path/'c100.pt')
    with pytest.raises(ValueError, match='labels of 100 classes, but the data have 10'): cifar10_dls(c10, noise=HumanLabels(tmp_path/'c100.pt', 'noisy'), progress=False)
    with pytest.raises(ValueError, match='another class|lies outside|the same number'): folder_block(HumanLabels(tmp_path/'short.pt', 'worse')).datasets(c10)
    for bad in ({'worse_label': d['worse_label']}, {**d, 'worse_label': d['worse_label'][:3]}, {**d, 'worse_label': d['worse_label'].astype(float)}, [1,2]):
        torch.save(bad, tmp_path/'bad.pt')
        with pytest.raises(ValueError, match='must hold a dictionary|not of integers'): HumanLabels(tmp_path/'bad.pt', 'worse')

class Ask:
    "Pickles as a call of any function"
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f,self.args

def build_pickle(kind):
    "A pickle that changes what stands in for `_codecs.encode`, or that holds a type that lies about its fields"
    change = b'c_codecs\nencode\n(N}X\x0c\x00\x00\x00__defaults__(X\x01\x00\x00\x00xtstb'
    lie = b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|N(X\x01\x00\x00\x00ft}X\x01\x00\x00\x00fcnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tRK\x00\x86sK\x08K\x01K\x00tb"
    return b'\x80\x02' + dict(change=change, lie=lie)[kind] + b'.'

@pytest.mark.parametrize('kind', ('change','lie'))
def test_a_file_that_changes_what_stands_in(tmp_path, kind):
    import zipfile
    with zipfile.ZipFile(tmp_path/'h.pt', 'w') as z: z.writestr('archive/data.pkl', build_pickle(kind))
    with pytest.raises(ValueError, match='nothing in it was run: (it asks to change|it holds an array of type)'): HumanLabels(tmp_path/'h.pt', 'worse')

class Object:
    "Pickles as an array of objects, or of more items than it has bytes for"
    def __init__(self, kind): self.kind = kind
    def __reduce__(self):
        f,args,state = np.arange(4).__reduce__()
        dt = np.dtype(object) if self.kind == 'object' else np.dtype('i8')
        return f,args,(1, (10**6,) if self.kind == 'long' else (4,), dt, False, b'x'*32)

@pytest.mark.parametrize('kind', ('object','long'))
def test_an_array_that_is_none_is_refused(tmp_path, kind, human):
    torch.save({**human[1], 'worse_label': Object(kind)}, tmp_path/'hostile.pt')
    with pytest.raises(ValueError, match='is not a file of human labels'): HumanLabels(tmp_path/'hostile.pt', 'aggre')

@pytest.mark.parametrize('f', (os.system, eval, os.mkdir, subprocess.check_output, np.load, np.frombuffer, torch.tensor, getattr, pickle.loads), ids=lambda f: f.__name__)
def test_a_hostile_label_file_runs_nothing(tmp_path, f, human):
    mark = tmp_path/'ran'
    args = {os.system: (f'touch {mark}',), eval: (f"open({str(mark)!r},'w')",), os.mkdir: (str(mark),), subprocess.check_output: (['touch',str(mark)],), np.load: (str(mark),),
            np.frombuffer: (b'abcd',), torch.tensor: ([1,2],), getattr: (mark,'touch'), pickle.loads: (pickle.dumps(Ask(os.mkdir, str(mark))),)}[f]
    torch.save({**human[1], 'worse_label': Ask(f, *args)}, tmp_path/'hostile.pt')
    with pytest.raises(ValueError, match='nothing in it was run: it asks for'): HumanLabels(tmp_path/'hostile.pt', 'aggre')
    assert not mark.exists()

def test_files_that_are_no_label_files(tmp_path):
    for name,data in (('text.pt',b'hello'), ('empty.pt',b''), ('pickle.pt', pickle.dumps(dict(a=1)))):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match='is not a file of human labels'): HumanLabels(tmp_path/name, 'worse')

# real data

@pytest.fixture(scope='module')
def real(pytestconfig):
    path = pytestconfig.getoption('--data-path') or os.environ.get('FASTAI_JOCOR_DATA')
    if not path or not (Path(path)/'cifar10'/'train').is_dir(): pytest.skip('no real CIFAR-10: pass --data-path, or set FASTAI_JOCOR_DATA, to the folder that holds cifar10/train and cifar10/test')
    return Path(path)

def test_real_cifar10(real):
    dls = cifar10_dls(real, noise=Symmetric(.5), progress=False)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (50_000, 10_000) and np.bincount(dls.noise.true).tolist() == [5000]*10
    assert abs(dls.noise.rate-.5) < .01
    part = cifar10_dls(real, noise=Symmetric(.5), subset=2000, progress=False)
    given = dls.noise.table.set_index('item').noisy
    assert len(part.train_ds) == 2000 and part.noise.table.noisy.tolist() == given[part.noise.table.item].tolist()

def test_real_human_labels(real):
    file = real/'CIFAR-10_human.pt'
    if not file.exists(): pytest.skip(f'no CIFAR-10_human.pt in {real}')
    images = None
    for which,want in dict(aggre=.0901, random1=.1723, random2=.1812, random3=.1764, worse=.4021).items():
        rec = folder_labels(real, HumanLabels(file, which))
        assert round(rec.rate, 4) == want
    assert round(cifar10_dls(real, noise=HumanLabels(file,'worse'), progress=False).noise.rate, 4) == .4021

def folder_labels(real, noise):
    files = get_image_files(real/'cifar10'/'train')
    y = [cifar10_classes.index(f.parent.name) for f in files]
    keys = [f.relative_to(real/'cifar10'/'train').as_posix() for f in files]
    return NoiseRecord(y, noise.corrupt(y, cifar10_classes, keys=keys), cifar10_classes, noise)

def test_real_instance_noise_goes_by_the_image(real):
    "Pictures of a class that are alike are mislabelled alike: the given label is predictable from the pixels, which symmetric noise's is not"
    from sklearn.linear_model import LogisticRegression
    def predictable(noise):
        dls = cifar10_dls(real, noise=noise, subset=20_000, progress=False)
        rec,x = dls.noise,dls.train.store.images[dls.train.pos].numpy()[:,::4,::4].reshape(20_000,-1)/255.
        cat = rec.flipped & (rec.true == 3)
        half = cat.sum()//2
        return LogisticRegression(max_iter=300).fit(x[cat][:half], rec.noisy[cat][:half]).score(x[cat][half:], rec.noisy[cat][half:])
    assert predictable(InstanceDependent(.4)) > predictable(Symmetric(.4)) + .2
