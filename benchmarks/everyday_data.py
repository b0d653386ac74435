"""The data, the noise and the learners of everyday.py and find.py"""
import os, numpy as np, pandas as pd, torch
from collections import namedtuple
from functools import lru_cache
from fastai.tabular.all import *
from fastai.text.all import TextBlock, pad_input
from fastai.vision.all import CategoryBlock, ChannelsLast, ColReader, ColSplitter, DataBlock, ImageBlock
from fastai.vision.all import get_image_files, IndexSplitter, PILImage, Resize, ResizeMethod, vision_learner
from torch.utils.data import TensorDataset
from fastai_jocor.all import Asymmetric, AutocastBF16, cifar10_dls, InMemoryDataLoaders, InstanceDependent, Symmetric
from fastai_jocor.all import jocor_cnn, jocor_mlp, mnist_dls
from fastai_jocor.heads import fused_adam
from fastai_jocor.human import read_label_file

# The data: arrays of inputs and true labels; `human` holds label sets that people gave to the training items
Source = namedtuple('Source', 'x y x_test y_test names human')

def _numbers(n): return [str(i) for i in range(n)]

def digits(path, seed):
    "scikit-learn's digits, 1,257 for training"
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    d = load_digits()
    x = (d.images*15).astype(np.uint8)
    x,x_test,y,y_test = train_test_split(x, d.target, test_size=.3, stratify=d.target, random_state=0)
    return Source(x, y, x_test, y_test, _numbers(10), {})

def rare(path, seed):
    "The digit 3 against all others, one to twenty"
    d = digits(path, seed)
    y,y_test = (d.y == 3)*1,(d.y_test == 3)*1
    rest,own = np.flatnonzero(y == 0),np.flatnonzero(y == 1)
    keep = np.sort(np.concatenate([rest, own[:len(rest)//20]]))
    return Source(d.x[keep], y[keep], d.x_test, y_test, ['other','three'], {})

def scarce(path, seed):
    "Digits with 12 items of each of the classes 3 and 8, others for each seed"
    d,rng = digits(path, seed),np.random.default_rng(seed)
    surplus = [rng.permutation(np.flatnonzero(d.y == c))[12:] for c in (3,8)]
    keep = np.setdiff1d(np.arange(len(d.y)), np.concatenate(surplus))
    return d._replace(x=d.x[keep], y=d.y[keep])

def _some(d, n, seed):
    "A random part of the training items, another one for each seed"
    at = np.sort(np.random.default_rng(seed).permutation(len(d.y))[:n])
    return d._replace(x=d.x[at], y=d.y[at], human={k: v[at] for k,v in d.human.items()})

def _stored(dl): return dl.store.images[dl.pos].cpu().numpy(),dl.store.targets[dl.pos].cpu().numpy()

def mnist(path, seed, n=10000):
    "Some images of MNIST, others for each seed"
    dls = mnist_dls(path, download=False)
    (x,y),(x_test,y_test) = _stored(dls.train),_stored(dls.valid)
    return _some(Source(x[...,0], y, x_test[...,0], y_test, _numbers(10), {}), n, seed)

@lru_cache(2)
def _features(file):
    z = np.load(file)
    x,x_test = (torch.from_numpy(z[o].astype(np.float32)) for o in ('x_train','x_test'))
    names = [str(o) for o in z['classes']] if 'classes' in z else _numbers(10)
    human = {k.split('_')[0]: z[k].astype(np.int64) for k in ('aggre_label','random_label1','worse_label') if k in z}
    return Source(x, z['y_train'].astype(np.int64), x_test, z['y_test'].astype(np.int64), names, human)

def features(path, seed): return _features(path/'cifar10_features.npz')
def features5k(path, seed): return _some(features(path, seed), 5000, seed)
def features10k(path, seed): return _some(features(path, seed), 10000, seed)
def features1k(path, seed): return _some(features(path, seed), 1000, seed)
def features500(path, seed): return _some(features(path, seed), 500, seed)

def _fewer_numbers(d, n):
    "Hard items: only n of the numbers that describe each, the same ones in every run"
    at = np.random.default_rng(0).permutation(d.x.shape[1])[:n]
    return d._replace(x=d.x[:,at], x_test=d.x_test[:,at])

def hard3k(path, seed): return _some(_fewer_numbers(features(path, seed), 64), 3000, seed)
def hard10k(path, seed): return _some(_fewer_numbers(features(path, seed), 32), 10000, seed)
def clothing(path, seed): return _features(path/'clothing_features.npz')
def clothing500(path, seed): return _some(clothing(path, seed), 500, seed)

def adult(path, seed):
    "Adult census income, a table of 32,561 rows; a fifth of them for testing"
    df = pd.read_csv(path/'adult'/'adult.csv.gz', skipinitialspace=True, na_values='?')
    y = df.pop(df.columns[-1])
    test = np.random.default_rng(0).permutation(len(df)) < len(df)//5
    names = sorted(y.unique())
    y = y.map(names.index).to_numpy()
    return Source(df[~test], y[~test], df[test], y[test], names, {})

def trec(path, seed):
    "Questions by the type of their answer, six classes"
    def read(file):
        lines = (path/'trec'/file).read_text(encoding='latin-1').splitlines()
        return pd.DataFrame([(o.split(' ', 1)[1], o.split(':')[0]) for o in lines], columns=['text','type'])
    train,test = read('train_5500.label'),read('TREC_10.label')
    names = sorted(train.type.unique())
    y,y_test = (o.type.map(names.index).to_numpy() for o in (train, test))
    return Source(train[['text']], y, test[['text']], y_test, names, {})

@lru_cache(1)
def _photographs(path):
    dls = cifar10_dls(path, progress=False)
    human,labels = {},read_label_file(path/'CIFAR-10_human.pt')
    for name in ('aggre','worse'): # class by class, as the images are
        given,true = labels[f'{name}_label'],labels['clean_label']
        human[name] = np.concatenate([given[true == c] for c in range(10)]).astype(np.int64)
    return Source(*_stored(dls.train), *_stored(dls.valid), list(dls.vocab), human)

def cifar(path, seed):
    "10,000 images of CIFAR-10"
    return _some(_photographs(path), 10000, seed)

def cifar3k(path, seed):
    "3,000 images of CIFAR-10, to fine-tune a pretrained body on"
    return _some(_photographs(path), 3000, seed)

def clothing_photos(path, seed):
    "Photographs of clothes in ten classes, 3,068 for training"
    sets = [get_image_files(path/'clothing'/part).sorted() for part in ('train','test')]
    if not sets[0]: raise FileNotFoundError(path/'clothing'/'train')
    names = sorted({o.parent.name for o in sets[0]})
    labels = [np.array([names.index(o.parent.name) for o in files]) for files in sets]
    x,x_test = (np.array([str(o) for o in files]) for files in sets)
    return Source(x, labels[0], x_test, labels[1], names, {})

def clothing_timm(path, seed): return _some(clothing_photos(path, seed), 1500, seed)

# Noise
digit_pairs = {7:1, 2:7, 5:6, 6:5, 3:8}
pairs = dict(digits=digit_pairs, scarce=digit_pairs, mnist=digit_pairs, features={9:1, 2:0, 3:5, 5:3, 4:7},
             adult={'>50K':'<=50K'},
             clothing={'shirt':'t-shirt', 't-shirt':'longsleeve', 'longsleeve':'shirt'},
             trec={'ENTY':'DESC', 'DESC':'ENTY', 'HUM':'ENTY', 'LOC':'NUM'})
as_cifar = 'features500','features1k','features5k','features10k','features30','hard3k','hard10k','cifar'
pairs |= {o: pairs['features'] for o in as_cifar}
pairs |= {o: pairs['clothing'] for o in ('clothing500','clothing_photos','clothing_timm')}

def given_labels(d, data, noise, seed):
    "The labels that the learner gets"
    name,_,rate = noise.partition(' ')
    if name == 'clean': return d.y
    if name in d.human: return d.human[name]
    rate = float(rate)/100
    if name == 'symmetric': return Symmetric(rate).corrupt(d.y, d.names, seed)
    if name == 'asymmetric': return Asymmetric(rate, pairs[data]).corrupt(d.y, d.names, seed)
    return InstanceDependent(rate).corrupt(d.y, d.names, seed, items=d.x)

# Learners
class ArrayDL(DataLoader):
    "Batches of a `TensorDataset`"
    def create_batches(self, samps):
        for idxs in chunked(samps, self.bs, self.drop_last): yield self.dataset[list(idxs)]

class MeanOfWords(nn.Module):
    "A perceptron on the mean of the words' vectors; word 1 is padding"
    def __init__(self, n_words, n_out, n=100):
        super().__init__()
        self.words = nn.Embedding(n_words, n, padding_idx=1)
        self.head = nn.Sequential(nn.Dropout(.25), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n_out))
    def forward(self, x):
        known = (x != 1).unsqueeze(-1).float()
        return self.head((self.words(x)*known).sum(1)/known.sum(1))

fastais_adam = partial(fused_adam, betas=(.9,.99), eps=1e-5) # computed in one go, for large networks

def image_learner(d, y, bs, **kwargs):
    n = len(y)
    x,labels = np.concatenate([d.x, d.x_test]),np.concatenate([y, d.y_test])
    dls = InMemoryDataLoaders.from_arrays(x, labels, d.names, train=np.arange(n), valid=np.arange(n, len(x)), bs=bs)
    if x.ndim == 4:
        cbs = [ChannelsLast(), AutocastBF16()]
        return Learner(dls, jocor_cnn(len(d.names)), opt_func=fastais_adam, cbs=cbs, **kwargs)
    return Learner(dls, jocor_mlp(len(d.names), x[0].size), **kwargs)

def feature_learner(d, y, bs, **kwargs):
    train,test = TensorDataset(d.x, torch.as_tensor(y)),TensorDataset(d.x_test, torch.as_tensor(d.y_test))
    first = ArrayDL(train, bs=bs, shuffle=True, drop_last=True, num_workers=0)
    dls = DataLoaders(first, ArrayDL(test, bs=1000, num_workers=0))
    kwargs = dict(loss_func=CrossEntropyLossFlat()) | kwargs
    return Learner(dls, jocor_mlp(len(d.names), d.x.shape[1]), **kwargs)

def table_learner(d, y, bs, **kwargs):
    df,n = pd.concat([d.x, d.x_test], ignore_index=True),len(y)
    df['label'] = np.array(d.names)[np.concatenate([y, d.y_test])]
    cont = [o for o in d.x if d.x[o].dtype.kind in 'iuf']
    cat = [o for o in d.x if o not in cont]
    to = TabularPandas(df, [Categorify, FillMissing, Normalize], cat, cont, 'label', CategoryBlock(),
                       splits=(list(range(n)), list(range(n, len(df)))))
    return tabular_learner(to.dataloaders(bs=bs), layers=[200,100], n_out=len(d.names), **kwargs)

def text_learner(d, y, bs, **kwargs):
    df = pd.concat([d.x, d.x_test], ignore_index=True)
    df['label'] = np.array(d.names)[np.concatenate([y, d.y_test])]
    df['test'] = np.arange(len(df)) >= len(y)
    block = DataBlock((TextBlock.from_df('text', n_workers=0), CategoryBlock(vocab=d.names)), get_x=ColReader('text'),
                      get_y=ColReader('label'), splitter=ColSplitter('test'))
    sets = block.datasets(df)
    dls = DataLoaders.from_dsets(list(sets.train), list(sets.valid), bs=bs, before_batch=pad_input, num_workers=0)
    kwargs = dict(loss_func=CrossEntropyLossFlat()) | kwargs
    return Learner(dls, MeanOfWords(len(sets.vocab[0]), len(d.names)), **kwargs)

WEIGHTS = os.environ.get('FASTAI_JOCOR_WEIGHTS')

@lru_cache(None)
def _squished(file, size):
    "A photograph as `Resize` would squeeze it, read once"
    return Resize(size, ResizeMethod.Squish).encodes(PILImage.create(file))

def photo_learner(d, y, bs, size=96, resize=ResizeMethod.Squish, **kwargs):
    "A pretrained body with a new head"
    n,x,labels = len(y),[*d.x, *d.x_test],np.concatenate([y, d.y_test])
    def picture(i):
        return _squished(x[i], size) if isinstance(x[i], str) and resize == ResizeMethod.Squish else x[i]
    block = DataBlock((ImageBlock, CategoryBlock(vocab=d.names)), get_items=noop, get_x=picture,
                      get_y=lambda i: d.names[labels[i]], splitter=IndexSplitter(range(n, len(x))),
                      item_tfms=Resize(size, resize))
    dls = block.dataloaders(list(range(len(x))), bs=bs, num_workers=0)
    if WEIGHTS: kwargs['pretrained_cfg_overlay'] = dict(file=WEIGHTS)
    return vision_learner(dls, 'tf_efficientnet_lite0', loss_func=kwargs.pop('loss_func', None),
                          cbs=ChannelsLast(), **kwargs)

def timm_learner(d, y, bs, **kwargs):
    "A pretrained network of timm in a plain `Learner`, which does not know that it is pretrained"
    import timm
    dls,file = photo_learner(d, y, bs).dls,dict(file=WEIGHTS) if WEIGHTS else None
    net = timm.create_model('tf_efficientnet_lite0', pretrained=True, num_classes=len(d.names),
                            pretrained_cfg_overlay=file)
    return Learner(dls, net, cbs=ChannelsLast(), opt_func=fastais_adam, **kwargs)
