"Loaders in memory: batches, stores, what a `DataBlock` becomes, memory, and what cannot be held."
import os, subprocess, sys, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from fastai.vision.all import (CategoryBlock, ClassificationInterpretation, DataBlock, DataLoaders, FlipItem,
    ImageBlock, IndexSplitter, Learner, MultiCategoryBlock, Path, RandomSplitter, RegressionBlock, Resize, TfmdDL,
    TransformBlock, accuracy, first, get_image_files, load_learner, parent_label, warnings)
from fastai_jocor.instance import InstanceDependent
from fastai_jocor.lab.store import *
from fastai_jocor.lab.data import *
from fastai_jocor.lab.datasets import cifar10_dls, jocor_cnn
from image_files import c10, folder_block, make_cifar, picture

from_arrays = InMemoryDataLoaders.from_arrays
def from_dls(dls, n_workers=0): return InMemoryDataLoaders.from_dls(dls, n_workers=n_workers, progress=False)

# --- stores and batches

def test_batches_are_channels_last_and_the_array_is_not_copied():
    X = np.random.RandomState(0).randint(0, 256, (50,8,8,3), dtype=np.uint8)
    dls = from_arrays(X, np.arange(50)%2, bs=8, device='cpu')
    x,_ = dls.one_batch()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert np.shares_memory(dls.train.store.images.numpy(), X)
    chw = from_arrays(X.transpose(0,3,1,2), np.arange(50)%2, bs=8, device='cpu')
    torch.testing.assert_close(first(chw.valid)[0], first(dls.valid)[0])

def test_the_tensor_moves_to_the_device_only_where_it_fits(monkeypatch):
    import fastai_jocor.lab.store as m
    store = ImageStore(np.zeros((4,8,8), np.uint8), [0,1,0,1])
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (600,1000))
    assert m._fits(300, torch.device('cuda:0')) and not m._fits(301, torch.device('cuda:0'))
    assert m._fits(10**12, torch.device('cpu')) and not m._fits(1, torch.device('meta'))
    monkeypatch.setattr(m, '_fits', lambda n,d: True)
    store.to('meta')
    x,y = store.batch(torch.tensor([0,1]))
    assert {o.device.type for o in (store.images, store.targets, x, y)} == {'meta'}

def test_new_loaders_keep_or_leave_the_store(c10):
    dls = cifar10_dls(c10, bs=16, progress=False)
    small = dls.train.new(bs=4)
    assert isinstance(small, MemoryDL) and small.store is dls.train.store is dls.valid.store
    assert len(first(small)[0]) == 4
    assert type(dls.train.new(dls.valid_ds.new_empty())) is TfmdDL
    assert sum(len(b[0]) for b in dls.train.new(n=8, drop_last=False)) == 8
    chosen = dls.train.new(get_idxs=lambda: [5,2,7], drop_last=False).one_batch()[1]
    assert chosen.tolist() == dls.train.labels[[5,2,7]].tolist()

@pytest.mark.parametrize('of_block', (False,True))
def test_relabelled(c10, of_block):
    def block(): return from_dls(folder_block().dataloaders(c10, bs=16, num_workers=0))
    dls = block() if of_block else cifar10_dls(c10, progress=False)
    train,labels,left = dls.train,np.arange(60)%10,np.arange(1, 60, 2)
    ds = dls.valid_ds if of_block else None
    new = train.relabelled(labels, left, 'a record', ds)
    assert isinstance(new, MemoryDL) and new.labels.tolist() == labels[left].tolist()
    assert new.store.images is train.store.images and train.labels.tolist() == [i//6 for i in range(60)]
    if of_block: assert new.dataset is ds
    else: assert [int(y) for _,y in new.dataset] == labels[left].tolist() and new.noise == 'a record'
    order = new.new(shuffle=False, drop_last=False, bs=30).one_batch()
    assert (order[0] == train.new(shuffle=False, drop_last=False, bs=60).one_batch()[0][left]).all()

seeds = st.integers(0,2**31)
sides = st.tuples(st.integers(2,9), st.integers(2,9))

@given(seed=seeds, pad=st.integers(0,5), n=st.integers(1,6), c=st.sampled_from((1,3)), hw=sides, last=st.booleans(),
       kind=st.sampled_from((torch.uint8,torch.float32)))
def test_crop_flip_is_a_shift_of_each_image(seed, pad, n, c, hw, last, kind):
    torch.manual_seed(seed)
    x = torch.randint(1, 250, (n,c,*hw)).to(kind)
    if last: x = x.contiguous(memory_format=torch.channels_last)
    out = crop_flip(x, pad)
    assert out.shape == x.shape and out.dtype == x.dtype
    shifts = [(i,j) for i in range(2*pad+1) for j in range(2*pad+1)]
    for a,o in zip(x, out):
        padded = [np.pad(p.numpy(), ((0,0),(pad,pad),(pad,pad))) for p in (a, a.flip(-1))]
        assert any((q[:,i:i+hw[0],j:j+hw[1]] == o.numpy()).all() for q in padded for i,j in shifts)

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

CASES = dict(plain='', normalise='normalize=([.5]*3,[.2]*3)', crop='batch_tfms=CropFlip()',
             both='batch_tfms=CropFlip(), normalize=([.5]*3,[.2]*3)')

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs the peak of memory of Linux')
@pytest.mark.parametrize('case', CASES)
def test_memory_of_an_epoch(case):
    "Beside the tensor of bytes, the peak is about two batches: the one in use and the one that is made"
    code = f'''
import numpy as np, torch
from fastai_jocor.lab.data import *
from fastai_jocor.lab.store import CropFlip
torch.set_num_threads(1)
def now(key): return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith(key)))/1024
def make(n, bs):
    X,y = np.full((n,64,64,3), 7, np.uint8),np.arange(n)%2
    return InMemoryDataLoaders.from_arrays(X, y, bs=bs, device='cpu', {CASES[case]})
for b in make(300, 20).train: pass
dls = make(6000, 1000)
del b
before = now('VmRSS')
open('/proc/self/clear_refs','w').write('5')
for b in dls.train: pass
print((now('VmHWM')-before)/(1000*64*64*3*4/2**20))
'''
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}
    out = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True, env=env)
    assert 1 < float(out.stdout) < 2.8, out.stdout+out.stderr

# --- from a DataBlock

@pytest.mark.parametrize('workers', (0,2))
def test_from_dls_gives_the_same_batches(c10, workers):
    slow = folder_block('symmetric:0.5').dataloaders(c10, bs=16, num_workers=0, device='cpu')
    fast = from_dls(slow, workers)
    assert isinstance(fast.train, MemoryDL) and isinstance(fast, DataLoaders)
    assert fast.c == 10 and fast.vocab == slow.vocab
    for i in (0,1):
        for a,b in zip(slow[i].new(shuffle=False), fast[i].new(shuffle=False)):
            assert [type(o) for o in a] == [type(o) for o in b]
            for p,q in zip(a,b): torch.testing.assert_close(p, q)
    assert (fast.noise.noisy == slow.noise.noisy).all() and fast.noise.flipped.any()
    orders = [torch.cat([b[1] for b in fast.train]).tolist() for _ in range(2)]
    assert orders[0] != orders[1] and len(orders[0]) == 48
    f,x = slow.train_ds.items[4],fast.train.new(shuffle=False).one_batch()[0]
    for dls in (slow, fast): torch.testing.assert_close(first(dls.test_dl([f,f]))[0][0], x[4])

def test_many_items_are_read_by_workers(tmp_path):
    make_cifar(tmp_path/'c', list('ab'), 150, 2)
    slow = folder_block().dataloaders(tmp_path/'c', num_workers=0)
    one,two = (from_dls(slow, n).train.store for n in (0,2))
    assert len(one) == 304 and torch.equal(one.images, two.images) and torch.equal(one.targets, two.targets)

def test_from_dls_of_many_kinds(c10):
    files = get_image_files(c10/'train').sorted()
    def block(target, get_y): return DataBlock((ImageBlock, target), get_items=lambda _: files, get_y=get_y)
    rows = pd.DataFrame(dict(f=[str(f) for f in files], y=[f.parent.name for f in files]))
    frame = DataBlock((ImageBlock, CategoryBlock), get_x=lambda r: r.f, get_y=lambda r: r.y,
                      splitter=RandomSplitter(seed=0))
    many = block(MultiCategoryBlock, lambda f: [parent_label(f), f.stem])
    number,plain = block(RegressionBlock, lambda f: float(f.stem)),block(TransformBlock, lambda f: int(f.stem)%2)
    for b,src in ((many,c10), (frame,rows), (number,c10), (plain,c10)):
        slow = b.dataloaders(src, bs=8, num_workers=0, device='cpu')
        for p,q in zip(first(slow.valid), first(from_dls(slow).valid)): torch.testing.assert_close(p, q)

def test_resize_is_taken_from_the_middle(tmp_path):
    rs = np.random.RandomState(0)
    for c in 'ab':
        for i in range(4): picture(rs, 20, tmp_path/c/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=IndexSplitter([0]), item_tfms=Resize((20,12)))
    dls = from_dls(block.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu'))
    im = np.asarray(Image.open(dls.train_ds.items[3]))
    assert (dls.train.store.images[3].numpy() == im[:,4:16]).all()

def test_an_ordinary_learner(c10, tmp_path):
    dls = from_dls(folder_block('symmetric:0.2').dataloaders(c10, bs=16, num_workers=0))
    learn = Learner(dls, jocor_cnn(10), metrics=accuracy, path=tmp_path)
    arrays = from_arrays(np.zeros((40,16,16,3), np.uint8), np.arange(40)%10, valid=.5, bs=8)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        for o in (learn, Learner(arrays, learn.model)): ClassificationInterpretation.from_learner(o).plot_top_losses(4)
        want = learn.predict(dls.valid_ds.items[2])
        preds = learn.get_preds(dl=dls.test_dl(dls.valid_ds.items))[0]
        torch.testing.assert_close(preds, learn.get_preds()[0])
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    weights = 4*sum(p.numel() for p in learn.model.parameters())
    assert (tmp_path/'export.pkl').stat().st_size < 60*3072 + weights
    with loaded.no_bar(): got = loaded.predict(dls.valid_ds.items[2])
    assert got[0] == want[0]
    torch.testing.assert_close(got[2], want[2])
    assert (loaded.dls.noise.noisy == dls.noise.noisy).all()

# --- from arrays

def test_masks_names_and_overlaps():
    X,y,mask = np.zeros((40,8,8), np.uint8),np.arange(40)%4,np.arange(40) >= 30
    a = from_arrays(X, y, valid=mask, noise='symmetric:0.5', bs=8)
    b = from_arrays(X, np.array(list('abcd'))[y], valid=range(30,40), train=~mask, noise='symmetric:0.5', bs=8)
    assert a.valid.pos.tolist() == b.valid.pos.tolist() == list(range(30,40))
    assert b.train.pos.tolist() == list(range(30))
    assert b.vocab == ['a','b','c','d'] and (a.noise.noisy == b.noise.noisy).all() and a.noise.flipped.any()
    with pytest.raises(ValueError, match='test holds 5 of the training items'):
        from_arrays(X, y, train=range(20), valid=range(20,30), test=range(15,40))
    with pytest.raises(ValueError, match='mask of 40'): from_arrays(X, y, valid=mask[:9])

@given(seed=seeds, n=st.integers(20,200), c=st.integers(2,4), share=st.floats(.25,.75))
def test_a_stratified_part(seed, n, c, share):
    y = np.concatenate([np.arange(c), np.arange(c), np.random.RandomState(seed).randint(0, c, n)])
    taken,rest = stratified(y, share)
    assert len(taken) == round(share*len(y)) and sorted([*taken,*rest]) == list(range(len(y)))
    for i in range(c): assert abs((y[taken]==i).sum() - share*(y==i).sum()) < 2

# --- what cannot be held

def test_corrupt_images_are_named_and_counted(tmp_path):
    root = make_cifar(tmp_path/'c')
    dls = folder_block().dataloaders(root, num_workers=0, bs=8)
    (root/'train'/'cat'/'0002.png').write_bytes(b'no image')
    dog = root/'test'/'dog'/'0001.png'
    dog.write_bytes(dog.read_bytes()[:500])
    error = r'0002.png cannot be read as an image .*, and 1 others'
    with pytest.raises(ValueError, match=error): cifar10_dls(root, progress=False)
    with pytest.raises(ValueError, match=error): from_dls(dls)
    with pytest.raises(ValueError, match='0002.png cannot be read as an image'):
        folder_block(InstanceDependent(.9)).datasets(root)

def test_unequal_sizes_are_named(tmp_path):
    root = make_cifar(tmp_path/'c')
    picture(np.random.RandomState(0), 20, root/'train'/'cat'/'0002.png')
    error = r'cat.0002.png has shape \(20, 20, 3\), most have \(32, 32, 3\); 1 of 90'
    with pytest.raises(ValueError, match=error): cifar10_dls(root, progress=False)
    with pytest.raises(ValueError, match=error): from_dls(folder_block().dataloaders(root, num_workers=0))
    with pytest.raises(ValueError, match='images must be of one size'):
        folder_block(InstanceDependent(.9)).datasets(root)

def test_a_validation_set_of_another_size(tmp_path):
    rs = np.random.RandomState(0)
    for split,size in (('train',16),('test',20)):
        for c in 'ab':
            for i in range(3): picture(rs, size, tmp_path/split/c/f'{i}.png')
    with pytest.raises(ValueError, match='images must be of one size'):
        from_dls(folder_block().dataloaders(tmp_path, bs=2, num_workers=0))

def test_images_of_16_bits_are_refused(tmp_path):
    root = make_cifar(tmp_path/'c')
    Image.fromarray((np.arange(1024).reshape(32,32)*60).astype(np.uint16)).save(root/'train'/'cat'/'0002.png')
    with pytest.raises(ValueError, match='more than 8 bits'): cifar10_dls(root, progress=False)

@pytest.mark.parametrize('kw,msg', ((dict(item_tfms=FlipItem()),'FlipItem'), ({},'before they are collated')))
def test_loaders_that_cannot_be_held(c10, kw, msg):
    late = {} if kw else dict(before_batch=lambda b: b)
    dls = folder_block(**kw).dataloaders(c10, num_workers=0, bs=8, **late)
    with pytest.raises(ValueError, match=msg): from_dls(dls)

def test_what_is_no_image_and_bad_targets(c10):
    no_image = DataBlock((CategoryBlock, CategoryBlock), get_x=lambda o: o%3, get_y=lambda o: o%2)
    with pytest.raises(ValueError, match='images'): from_dls(no_image.dataloaders(range(60), bs=4, num_workers=0))
    files = get_image_files(c10/'train').sorted()
    uneven = DataBlock((ImageBlock, TransformBlock), get_items=lambda _: files,
                       get_y=lambda f: torch.zeros(1+int(f.stem)%2))
    with pytest.raises(ValueError, match='targets must be of one shape'):
        from_dls(uneven.dataloaders(c10, bs=1, num_workers=0))
    with pytest.raises(ValueError, match='of 3 channels'):
        from_arrays(np.zeros((20,8,8,3), np.uint8), np.arange(20)%2, normalize=([.1,.2],[.1,.2]))

PARTS = (10,4,False,[4,4,2]),(10,4,True,[4,4]),(8,4,False,[4,4]),(3,4,False,[3]),(0,4,False,[])

@pytest.mark.parametrize('n,bs,drop_last,sizes', PARTS)
def test_the_order_of_an_epoch_moves_once(n, bs, drop_last, sizes, monkeypatch):
    "Batches are parts of one tensor of places, which went to the device of the images at once"
    store,seen = ImageStore(torch.arange(40, dtype=torch.uint8).view(10,2,2), torch.arange(10)),[]
    batch = ImageStore.batch
    monkeypatch.setattr(ImageStore, 'batch', lambda self, idxs: seen.append(idxs) or batch(self, idxs))
    dl = MemoryDL(range(n), store, torch.arange(n).flip(0), bs=bs, drop_last=drop_last)
    targets = [y for _,y in dl]
    assert [len(o) for o in seen] == sizes
    assert len({o.untyped_storage().data_ptr() for o in seen}) == min(len(sizes), 1)
    if sizes: assert torch.cat(targets).tolist() == list(range(n))[::-1][:sum(sizes)]
