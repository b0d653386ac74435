"Label files of people: what is read, what is refused before it runs, and which label belongs to which image."
import os, pickle, subprocess, zipfile, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import Path, get_image_files
from fastai_jocor.blocks import make_noise
from fastai_jocor.human import HumanLabels, read_label_file
from fastai_jocor.noise_record import NoiseRecord
from fastai_jocor.noise import Symmetric, cifar10_classes
from fastai_jocor.lab.datasets import cifar10_dls
from image_files import any_md5, c10, folder_block, human, make_cifar, real, write_batches

NAMES = dict(worse='worse_label', aggre='aggre_label', random1='random_label1')

def test_human_labels_of_folders(c10, human):
    file,d = human
    places = [np.flatnonzero(d['clean_label']==c) for c in range(10)]
    def record(noise, **kwargs): return cifar10_dls(c10, noise=noise, progress=False, **kwargs).noise
    for which,key in NAMES.items():
        rec = record(HumanLabels(file, which))
        want = [d[key][places[c][i]] for c in range(10) for i in range(6)]
        assert rec.noisy.tolist() == want and rec.rate == (d[key]!=d['clean_label']).mean() == rec.noise_rate
        assert record(f'human:{which}:{file}').noisy.tolist() == want
    ds = folder_block(HumanLabels(file, 'random1')).datasets(c10)
    given = {f'{f.parent.name}/{f.stem}': int(y) for f,y in zip(ds.train.items, ds.train.tls[1])}
    every = [(c,i) for c in range(10) for i in range(6)]
    assert given == {f'{cifar10_classes[c]}/{i:04d}': d['random_label1'][places[c][i]] for c,i in every}
    assert all(cifar10_classes[int(y)] == f.parent.name for f,y in zip(ds.valid.items, ds.valid.tls[1]))
    part,whole = (record(HumanLabels(file, 'worse'), subset=s).table.set_index('item').given_label for s in (.5,None))
    assert part.equals(whole[part.index])

def test_human_labels_of_batches(tmp_path, any_md5, human):
    file,d = human
    images = np.random.RandomState(0).randint(0, 256, (72,32,32,3), dtype=np.uint8)
    write_batches(tmp_path, images, np.concatenate([d['clean_label'], np.arange(12)%10]))
    assert cifar10_dls(tmp_path, noise=HumanLabels(file,'worse')).noise.noisy.tolist() == d['worse_label'].tolist()

def test_the_matrix_in_the_order_of_the_classes(human):
    file,d = human
    T = HumanLabels(file, 'worse').transition(cifar10_classes)
    back = HumanLabels(file, 'worse').transition(cifar10_classes[::-1])
    mirrored = HumanLabels(file, 'worse').corrupt(9-d['clean_label'], cifar10_classes[::-1])
    assert (mirrored == 9-d['worse_label']).all()
    assert np.allclose(T, back[::-1,::-1]) and T[3,3] == (d['worse_label'][d['clean_label']==3]==3).mean()

def test_names_without_a_number(tmp_path, human):
    root,worse = make_cifar(tmp_path/'cifar10'),HumanLabels(human[0], 'worse')
    for f in (root/'train').rglob('*.png'): f.rename(f.parent/f'a_7_{f.name}')
    with pytest.raises(ValueError, match='no number, or several'):
        cifar10_dls(root, noise=worse, progress=False)
    dls = cifar10_dls(root, noise='symmetric:0.5', progress=False)
    assert dls.noise.table.item[0] == 'airplane/a_7_0000.png'
    keys = [f'cat/{i}.png' for i in ('0','1','1','3','4','5')]
    with pytest.raises(ValueError, match='several items have the same number'):
        worse.corrupt([3]*6, cifar10_classes, keys=[*keys[:2],'cat/01.png',*keys[3:]])

def test_how_files_are_numbered(human):
    file,d = human
    clean,worse = d['clean_label'],d['worse_label']
    h,place = HumanLabels(file, 'worse'),pd.Series(clean).groupby(clean).cumcount()
    items = [(cifar10_classes[c], i, n) for i,(c,n) in enumerate(zip(clean, place))]
    ways = ('{0}/{2:04d}.png', '{0}/cifar10_{2}.png', '{0}/{0}{2}.png', '{0}/{1}_{0}.png')
    for way in ways:
        keys = [way.format(*o) for o in items]
        assert (h.corrupt(clean, cifar10_classes, keys=keys) == worse).all(), way
    for way in ('{0}/{2}.png', '{0}/{1}_{0}.png'):
        from_one = [way.format(c, i+1, n+1) for c,i,n in items]
        assert (h.corrupt(clean, cifar10_classes, keys=from_one) == worse).all(), way
    assert (h.corrupt(clean, cifar10_classes, keys=range(60)) == worse).all()
    few = [f'{c}/{i}_{c}.png' for c,i,_ in items[:20]]
    assert (h.corrupt(clean[:20], cifar10_classes, keys=few) == worse[:20]).all()
    with pytest.raises(ValueError, match='take more items'): h.corrupt(clean[:2], cifar10_classes, keys=few[:2])
    with pytest.raises(ValueError, match='no number, or several'):
        h.corrupt(clean[:1], cifar10_classes, keys=['cat/1_2.png'])
    one,ranks = HumanLabels(file, 'worse', start=1),[f'{c}/{n}' for c,_,n in items]
    assert (one.corrupt(clean, cifar10_classes, keys=ranks) == worse).all()
    with pytest.raises(ValueError, match='out of range'):
        one.corrupt(clean, cifar10_classes, keys=[r+'.png' for r in ranks])

def test_a_label_file_that_does_not_fit(c10, human, tmp_path):
    d = human[1]
    def labels(which='worse', **o):
        torch.save(o, tmp_path/'other.pt')
        return HumanLabels(tmp_path/'other.pt', which)
    order = labels(**{**d, 'clean_label': d['clean_label'][::-1].copy()})
    with pytest.raises(ValueError, match='have another class in the file'): order.corrupt(d['clean_label'], 10)
    short = labels(**{k: v[:50] for k,v in d.items()})
    with pytest.raises(ValueError, match='does not fit'): cifar10_dls(c10, noise=short, progress=False)
    with pytest.raises(ValueError, match='another class|out of range|the same number'):
        folder_block(short).datasets(c10)
    c100 = labels('noisy', **{k: np.arange(300)%100 for k in ('clean_label','noisy_label')})
    with pytest.raises(ValueError, match='labels of 100 classes, but the data have 10'):
        cifar10_dls(c10, noise=c100, progress=False)
    with pytest.raises(ValueError, match='must hold a dictionary'): labels(worse_label=d['worse_label'])
    with pytest.raises(ValueError, match='must hold a dictionary'): labels(**{**d, 'worse_label': d['worse_label'][:3]})
    with pytest.raises(ValueError, match='is not a file of human labels'):
        labels(**{**d, 'worse_label': d['worse_label'].astype(float)})

# --- files that are not trusted

def with_pickle(human, file, data):
    "A label file whose pickle is replaced"
    with zipfile.ZipFile(human[0]) as old, zipfile.ZipFile(file, 'w') as new:
        for n in old.namelist(): new.writestr(n, data if n.endswith('data.pkl') else old.read(n))
    return file

def text(o): return b'X' + bytes([len(o),0,0,0]) + o
def as_dict(value): return b'\x80\x02}(' + text(b'clean_label') + value + text(b'worse_label') + value + b'u.'

def array(dtype, n=1):
    "Opcodes of an array of n integers whose data type is built by the opcodes `dtype`"
    start = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85c_codecs\nencode\n(X\x01\x00\x00\x00bX'
    start += b'\x06\x00\x00\x00latin1tRtR'
    ones = b'\x01\x00\x00\x00\x00\x00\x00\x00'*n
    raw = b'c_codecs\nencode\n(' + text(ones) + text(b'latin1') + b'tR'
    return start + b'(K\x01K' + bytes([n]) + b'\x85' + dtype + b'\x89' + raw + b'tb'

INT64 = b'cnumpy\ndtype\n(X\x02\x00\x00\x00i8K\x00K\x01tR'
PLAIN = INT64 + b'(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
OBJECT = b'cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR'
FIELDS = b'(X\x01\x00\x00\x00ft}X\x01\x00\x00\x00f' + OBJECT + b'K\x00\x86s'
LYING = INT64 + b'(K\x03X\x01\x00\x00\x00<N' + FIELDS + b'K\x08K\x01K\x00tb'
CHANGE = b'c_codecs\nencode\n(N}X\x0c\x00\x00\x00__defaults__(X\x01\x00\x00\x00xtstb'

@pytest.mark.parametrize('core', (b'numpy.core', b'numpy._core'), ids=('older','newer'))
def test_pickles_of_older_and_newer_numpy(human, tmp_path, core):
    data = as_dict(array(PLAIN, 3)).replace(b'numpy.core', core)
    labels = read_label_file(with_pickle(human, tmp_path/'plain.pt', data))
    assert labels['worse_label'].tolist() == [1,1,1]

SHORT = array(PLAIN, 3).replace(b'K\x03\x85', b'K\x64\x85')

LIES = dict(fields=array(LYING), change=CHANGE, object=array(OBJECT), short=SHORT)

@pytest.mark.parametrize('kind', LIES)
def test_an_array_that_lies_is_refused(human, tmp_path, kind):
    "Of a type with hidden fields of objects, of objects, of more items than bytes; or a change of what stands in"
    file = with_pickle(human, tmp_path/'lie.pt', as_dict(LIES[kind]))
    with pytest.raises(ValueError, match='is not a file of human labels|must hold a dictionary'): read_label_file(file)

def test_the_lie_passes_torch_and_is_found_before_it_is_read(human, tmp_path):
    from fastai_jocor.human import _is_labels, _load_arrays
    a = _load_arrays(with_pickle(human, tmp_path/'lie.pt', as_dict(array(LYING))))['worse_label']
    assert a.dtype.kind == 'i' and a.dtype.fields is not None and not _is_labels(a)

class Ask:
    "Pickles as a call of any function"
    def __init__(self, f, *args): self.f,self.args = f,args
    def __reduce__(self): return self.f,self.args

ASKED = (os.system, eval, os.mkdir, subprocess.check_output, np.load, np.frombuffer, torch.tensor, getattr,
         pickle.loads)

@pytest.mark.parametrize('f', ASKED, ids=lambda f: f.__name__)
def test_a_hostile_label_file_runs_nothing(tmp_path, f, human):
    mark = tmp_path/'ran'
    args = {os.system: (f'touch {mark}',), eval: (f"open({str(mark)!r},'w')",),
            subprocess.check_output: (['touch',str(mark)],), np.frombuffer: (b'abcd',), torch.tensor: ([1,2],),
            getattr: (mark,'touch'),
            pickle.loads: (pickle.dumps(Ask(os.mkdir, str(mark))),)}.get(f, (str(mark),))
    torch.save({**human[1], 'worse_label': Ask(f, *args)}, tmp_path/'hostile.pt')
    with pytest.raises(ValueError, match='nothing in it was run: it asks for') as e:
        read_label_file(tmp_path/'hostile.pt')
    assert not mark.exists() and len(str(e.value)) < 400

def test_files_that_are_no_label_files(tmp_path):
    files = {'text.pt': b'hello', 'empty.pt': b'', 'pickle.pt': pickle.dumps(dict(a=1))}
    for name,data in files.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match='is not a file of human labels'): read_label_file(tmp_path/name)

# --- real data

def test_real_human_labels(real):
    file = real/'CIFAR-10_human.pt'
    if not file.exists(): pytest.skip(f'no CIFAR-10_human.pt in {real}')
    files = get_image_files(real/'cifar10'/'train')
    keys,y = [f'{f.parent.name}/{f.name}' for f in files],[cifar10_classes.index(f.parent.name) for f in files]
    for which,want in dict(aggre=.0901, random1=.1723, random2=.1812, random3=.1764, worse=.4021).items():
        noise = HumanLabels(file, which)
        rec = NoiseRecord(y, noise.corrupt(y, cifar10_classes, keys=keys), cifar10_classes, noise)
        assert round(rec.rate, 4) == want
    assert round(cifar10_dls(real, noise=HumanLabels(file,'worse'), progress=False).noise.rate, 4) == .4021
