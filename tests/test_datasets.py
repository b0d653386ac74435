"CIFAR in both layouts, downloads, subsets and options; real data where they are."
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.vision.all import Learner, Normalize, Path, accuracy, cifar_stats, first, nn
from fastai_jocor.instance import InstanceDependent
from fastai_jocor.noise import Symmetric, cifar10_classes, cifar100_classes, cifar100_superclasses
from fastai_jocor.lab.datasets import *
from image_files import any_md5, c10, make_cifar, real, write_batches

# --- the layouts of CIFAR

@pytest.mark.parametrize('ext', ('png','jpg'))
def test_cifar10_folders(tmp_path, ext):
    root = make_cifar(tmp_path/'cifar10', ext=ext)
    for path in (root, tmp_path):
        dls = cifar10_dls(path, noise='symmetric:0.5', seed=2, bs=16, progress=False)
        assert (len(dls.train_ds), len(dls.valid_ds), dls.c, list(dls.vocab)) == (60, 30, 10, cifar10_classes)
    xs = torch.cat([b[0] for b in dls.valid]).as_subclass(torch.Tensor)
    for i in (0, 17, 29):
        im = np.asarray(Image.open(root/'test'/cifar10_classes[i//3]/f'{i%3:04d}.{ext}'))
        torch.testing.assert_close(xs[i], torch.tensor(im).permute(2,0,1)/255.)
    assert torch.cat([b[1] for b in dls.valid]).tolist() == [i//3 for i in range(30)]
    assert dls.noise.true.tolist() == [i//6 for i in range(60)] and .2 < dls.noise.rate < .8

def test_cifar100_folders_with_superclasses(tmp_path):
    parents = {c: s for s,cs in cifar100_superclasses.items() for c in cs}
    make_cifar(tmp_path/'cifar100', cifar100_classes, 3, 1, parents=parents)
    dls = cifar100_dls(tmp_path, noise='asymmetric:1.0', bs=8, progress=False)
    assert dls.c == 100 and dls.noise.rate == 1. and (len(dls.train_ds), len(dls.valid_ds)) == (300, 100)
    def both(rec): return zip(rec.table.true_label[::3], rec.table.given_label[::3])
    assert all(parents[a] == parents[b] and a != b for a,b in both(dls.noise))
    official = cifar100_dls(tmp_path, noise='asymmetric:1.0:cifar100_official', progress=False).noise
    assert (official.noisy == official.true//5*5 + (official.true+1)%5).all()
    assert sum(parents[a]==parents[b] for a,b in both(official)) == 6

CIFARS = ((cifar10_dls,'cifar10',cifar10_classes), (cifar100_dls,'cifar100',cifar100_classes))

@pytest.mark.parametrize('f,name,vocab', CIFARS, ids=('cifar10','cifar100'))
def test_torchvision_batches(tmp_path, any_md5, f, name, vocab):
    rs,c = np.random.RandomState(1),len(vocab)
    images,labels = rs.randint(0, 256, (1200,32,32,3), dtype=np.uint8),np.tile(rs.permutation(c), 1200//c)
    write_batches(tmp_path, images, labels, name)
    for path in (tmp_path, next(tmp_path.iterdir())):
        dls = f(path, noise='symmetric:0.4', seed=5)
        assert (len(dls.train_ds), len(dls.valid_ds)) == (1000, 200) and list(dls.vocab) == vocab
    assert dls.noise.true.tolist() == labels[:1000].tolist()
    assert (np.asarray(dls.valid_ds[7][0]) == images[1007]).all() and int(dls.valid_ds[7][1]) == labels[1007]

def test_both_layouts_give_an_item_the_same_label(tmp_path, any_md5, c10):
    order = np.random.RandomState(4).permutation(np.repeat(np.arange(10), 6))
    place = pd.Series(order).groupby(order).cumcount()
    def read(f): return np.asarray(Image.open(f))
    train = [read(c10/'train'/cifar10_classes[c]/f'{i:04d}.png') for c,i in zip(order,place)]
    test = [read(c10/'test'/'cat'/'0000.png')]*12
    write_batches(tmp_path, np.stack(train+test), np.concatenate([order, [3]*12]))
    for noise in ('symmetric:0.5', 'instance:0.4', 'asymmetric:0.5'):
        recs = [cifar10_dls(p, noise=noise, seed=1, progress=False).noise for p in (c10, tmp_path)]
        a,b = (r.table.set_index('item') for r in recs)
        assert a.loc[b.index].equals(b) and a.flipped.any()

def test_missing_classes(tmp_path):
    make_cifar(tmp_path/'c', cifar10_classes[:-1])
    with pytest.raises(ValueError, match='each of 10 classes.*train has 9, test has 9; missing in train: truck'):
        cifar10_dls(tmp_path/'c')
    with pytest.raises(ValueError, match='each of 100 classes'): cifar100_dls(tmp_path/'c')

# --- downloads

IMAGES = np.random.RandomState(0).randint(0, 256, (120,32,32,3), dtype=np.uint8)

@pytest.fixture
def fake_download(monkeypatch, any_md5):
    import torchvision.datasets as tvd
    monkeypatch.setattr(tvd.CIFAR10, 'download', lambda self: write_batches(self.root, IMAGES, np.arange(120)%10))

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
    with pytest.raises(FileNotFoundError, match='the download failed: .*no network') as e:
        f(tmp_path/'new', download=True)
    assert str(tmp_path/'new') in str(e.value) and list((tmp_path/'new').iterdir()) == []

def test_a_download_mends_a_folder_that_is_not_whole(tmp_path, fake_download):
    write_batches(tmp_path, IMAGES, np.arange(120)%10)
    (tmp_path/'cifar-10-batches-py'/'data_batch_3').unlink()
    with pytest.raises(FileNotFoundError, match='no cifar10 found'): cifar10_dls(tmp_path)
    assert len(cifar10_dls(tmp_path, download=True).train_ds) == 100 and len(cifar10_dls(tmp_path).train_ds) == 100

def test_a_download_lands_in_place(tmp_path, fake_download):
    assert len(cifar10_dls(tmp_path/'new', download=True).train_ds) == 100
    assert [p.name for p in (tmp_path/'new').iterdir()] == ['cifar-10-batches-py']
    assert len(cifar10_dls(tmp_path/'new').train_ds) == 100

# --- options

def test_valid_subset_and_the_third_loader(c10):
    def dls(**kwargs): return cifar10_dls(c10, noise='symmetric:0.5', progress=False, **kwargs)
    part = dls(subset=.5, valid=1/3, bs=4)
    assert [len(dl.dataset) for dl in part.loaders] == [20,10,15]
    assert np.bincount(part.noise.true).tolist() == [2]*10
    assert np.bincount(torch.cat([b[1] for b in part[1]]).tolist()).tolist() == [1]*10
    table,given = part.noise.table,dls().noise.table.set_index('item').given_label
    assert table.given_label.tolist() == given[table.item].tolist()
    again = dls(seed=9, subset=30, valid=1/3)
    assert (again.train.pos == part.train.pos).all()
    assert again.noise.table.given_label.tolist() != table.given_label.tolist()
    learn = Learner(part, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,10)), metrics=accuracy)
    with learn.no_bar(): assert len(learn.get_preds(ds_idx=2)[0]) == 15

def test_augment(c10):
    def dls(augment): return cifar10_dls(c10, augment=augment, normalize=True, bs=32, progress=False, device='cpu')
    plain,aug = dls(None),dls('crop_flip')
    for (a,_),(b,_) in zip(plain.valid, aug.valid): torch.testing.assert_close(a, b)
    mean,std = (torch.tensor(o)[:,None,None] for o in cifar_stats)
    back = first(plain.valid)[0].as_subclass(torch.Tensor)*std + mean
    im = np.asarray(Image.open(c10/'test'/'airplane'/'0000.png'))
    torch.testing.assert_close(back[0], torch.tensor(im).permute(2,0,1)/255.)
    a,b = (first(aug.train.new(shuffle=False))[0].as_subclass(torch.Tensor) for _ in range(2))
    assert (a != b).any()
    black = (-mean/std)[:,:,0]
    assert torch.isclose(a[:,:,0,:], black).all(1).any()
    own = cifar10_dls(c10, augment=[Normalize.from_stats(*cifar_stats)], progress=False)
    assert [type(t).__name__ for t in own.train.after_batch.fs] == ['BytesToFloat','Normalize']

def test_a_part_smaller_than_a_batch_and_both_transforms(c10):
    tfms = [Normalize.from_stats(*cifar_stats)]
    dls = cifar10_dls(c10, subset=20, bs=128, augment='crop_flip', batch_tfms=tfms, progress=False)
    assert len(dls.train) == 1 and {'CropFlip','Normalize'} <= {type(t).__name__ for t in dls.train.after_batch.fs}

@pytest.mark.parametrize('kw,msg', [
    (dict(subset=1.5),'subset=1.5'), (dict(subset=True),'subset=True'), (dict(subset=5),'subset=5'),
    (dict(valid='train'),"valid='train'"), (dict(valid=.01),'valid=0.01'), (dict(augment='mixup'),"augment='mixup'"),
    (dict(noise='symmetric:2'),'rate=2.0'), (dict(noise='symmetric:0.001:exact'),'cannot reach its rate')])
def test_bad_options(c10, kw, msg):
    with pytest.raises(ValueError, match=msg): cifar10_dls(c10, progress=False, **kw)

# --- real data

def test_real_cifar10(real):
    dls = cifar10_dls(real, noise=Symmetric(.5), progress=False)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (50_000, 10_000)
    assert np.bincount(dls.noise.true).tolist() == [5000]*10 and abs(dls.noise.rate-.5) < .01
    part = cifar10_dls(real, noise=Symmetric(.5), subset=2000, progress=False)
    table,given = part.noise.table,dls.noise.table.set_index('item').given_label
    assert len(part.train_ds) == 2000 and table.given_label.tolist() == given[table.item].tolist()

def test_real_instance_noise_goes_by_the_image(real):
    "Similar pictures are mislabelled alike: the given label is predictable from the pixels, symmetric noise's is not"
    from sklearn.linear_model import LogisticRegression
    def predictable(noise):
        dls = cifar10_dls(real, noise=noise, subset=20_000, progress=False)
        rec,x = dls.noise,dls.train.store.images[dls.train.pos].numpy()[:,::4,::4].reshape(20_000,-1)/255.
        cat = rec.flipped & (rec.true == 3)
        x,y,half = x[cat],rec.noisy[cat],cat.sum()//2
        return LogisticRegression(max_iter=300).fit(x[:half], y[:half]).score(x[half:], y[half:])
    assert predictable(InstanceDependent(.4)) > predictable(Symmetric(.4)) + .2
