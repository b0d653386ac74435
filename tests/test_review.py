"From images to suspects, and from the page to a clean list of labels."
import json, re, shutil, warnings, pandas as pd, pytest, torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, Learner, accuracy, get_image_files
from fastcore.script import anno_parser
import fastai_jocor.lab.review as review
from fastai_jocor.files import read_table, write_table
from fastai_jocor.all import jocor_mlp
from fastai_jocor.lab.commands import jocor_audit
from fastai_jocor.lab.review import apply_reviewed, read_labels
from fastai_jocor.lab.run import fast_adam
from pictures import digit_files

def small(dls, arch, pretrained, path, **kwargs):
    "In the place of `vision_learner`: a perceptron, since a resnet18 takes long to train from scratch"
    model = jocor_mlp(dls.c, 3*32*32)
    learn = Learner(dls, model, opt_func=fast_adam, loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)
    learn.pretrained = pretrained
    return learn

def run_audit(*args, real=False, **kwargs):
    "The command, with a small network unless `real`"
    with pytest.MonkeyPatch.context() as mp, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if not real: mp.setattr(review, 'vision_learner', small)
        torch.set_num_threads(1)
        jocor_audit(*map(str, args), **kwargs)

def csv_of(folder, text):
    (folder/'labels.csv').write_text(text)
    return folder/'labels.csv'

def page_data(out):
    text = (out/'suspects.html').read_text(encoding='utf-8')
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])

@pytest.fixture(scope='module')
def wrong_pictures(tmp_path_factory):
    "Pictures of three classes, some in the wrong folder, two that are no images, and odd names"
    pictures,root = digit_files(tmp_path_factory.mktemp('right'), 10**4),tmp_path_factory.mktemp('wrong')/'images'
    names = {'c0': '=zero', 'c1': '<script>alert(1)<_script>', 'c2': "it's \"two\""}
    for i,f in enumerate(sorted(get_image_files(pictures))):
        moved = i%9 == 0 and f.parent.name == 'c0'
        to = root/names['c1' if moved else f.parent.name]
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to/f"{f.parent.name}_{i}'\"&.png")
    for n in ('c1', 'c2'): (root/names[n]/'broken.png').write_bytes(b'no image')
    return root,names

@pytest.fixture(scope='module')
def audited(wrong_pictures, tmp_path_factory):
    root,names = wrong_pictures
    files = lambda: {f: f.read_bytes() for f in root.rglob('*') if f.is_file()}
    before,out = files(),tmp_path_factory.mktemp('audit')
    run_audit(root, out=str(out), epochs=8, size=32, bs=16, k=2)
    assert files() == before
    return root,names,out

# an audit

def test_an_audit_of_a_folder(audited):
    root,names,out = audited
    s,data = read_table(out/'suspects.csv'),page_data(out)
    assert {f.name for f in out.iterdir()} == {'suspects.csv', 'suspects.html'}
    assert [r['item'] for r in data['rows']] == s['item'].tolist()
    assert len(data['bad']) == 2 and all('broken.png' in o for o in data['bad'])
    moved = {f.relative_to(root).as_posix() for f in root.rglob('c0_*') if f.parent.name == names['c1']}
    assert len(moved) > 15 and len(set(s['item']) & moved) > len(moved)/2 and len(s) < 3*len(moved)
    assert read_labels(root).file[s.position.astype(int)].tolist() == s['item'].tolist()
    assert "'=zero" in (out/'suspects.csv').read_text() and names['c1'] in set(s.given_label)
    assert all(r['picture'].startswith('data:image/jpeg;base64,') for r in data['rows'])
    assert '<script>alert' not in (out/'suspects.html').read_text(encoding='utf-8')

@pytest.mark.parametrize('name', ('n', 'epochs', 'size', 'bs', 'k', 'seed'))
def test_an_audit_refuses_numbers_before_it_trains(name, audited, tmp_path):
    bad = -1 if name in ('n', 'seed') else 0
    with pytest.raises(SystemExit, match=f'{name}={bad}'): run_audit(audited[0], out=str(tmp_path/'out'), **{name: bad})
    assert not (tmp_path/'out').exists()

class Die(Callback):
    "Stop at the end of the second epoch"
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt

def test_an_interrupted_audit_goes_on(wrong_pictures, tmp_path, capsys, monkeypatch):
    root = wrong_pictures[0]
    files = sorted(f for f in root.rglob('*.png') if 'broken' not in f.name)[::30]
    rows = dict(name=[f.relative_to(root).as_posix() for f in files], cls=[f.parent.name for f in files])
    pd.DataFrame(rows).to_csv(tmp_path/'l.csv', index=False)
    args = dict(path=str(root), file_col='name', label_col='cls', epochs=3, size=32, k=2)
    whole,cut,anew = (tmp_path/o for o in ('whole', 'cut', 'anew'))
    run_audit(tmp_path/'l.csv', out=str(whole), **args)
    make,trained = review.audit_learner,[]
    with monkeypatch.context() as m:
        m.setattr(review, 'audit_learner', lambda *args: make(*args).add_cb(Die()))
        for out in (cut, anew):
            with pytest.raises(KeyboardInterrupt): run_audit(tmp_path/'l.csv', out=str(out), **args)
    assert not (cut/'suspects.csv').exists()
    count = Callback(after_train=lambda self: trained.append(1))
    monkeypatch.setattr(review, 'audit_learner', lambda *args: make(*args).add_cb(count))
    capsys.readouterr()
    run_audit(tmp_path/'l.csv', out=str(cut), **args)
    assert 'going on with the audit that was interrupted' in capsys.readouterr().out and len(trained) == 2
    run_audit(tmp_path/'l.csv', out=str(anew), no_resume=True, **args)
    assert 'going on' not in capsys.readouterr().out and len(trained) == 2+3
    for out in (cut, anew):
        assert (out/'suspects.csv').read_bytes() == (whole/'suspects.csv').read_bytes()
        assert not (out/'checkpoint.pth').exists()

def test_an_audit_with_the_real_network(wrong_pictures, tmp_path):
    root = wrong_pictures[0]
    for f in sorted(root.rglob('c*.png'))[::30]:
        (tmp_path/'few'/f.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, tmp_path/'few'/f.parent.name)
    run_audit(tmp_path/'few', out=str(tmp_path/'resnet'), real=True, epochs=1, size=32, k=2)
    assert page_data(tmp_path/'resnet')['bad'] == []

# labels that cannot be audited

@pytest.mark.parametrize('text,message', [
    ('file,label\na.png,x\na.png,y\n', 'names 1 files more than once'),
    ('file,label\na.png,x\nb.png,x\n', 'holds 1 class'),
    ('file,label\na.png,x\nb.png,\nc.png,y\n', "no label to 1 of 3 files, such as 'b.png'"),
    ('file,label\na.png,x\nb.png,x \n', "spaces around them, such as 'x '"),
    ('image,label\na.png,x\n', "has no column 'file'"),
    ('file,label\na.png,x\nb.png,y\n', 'cannot be read')])
def test_bad_lists(tmp_path, text, message):
    with pytest.raises(SystemExit, match=message): run_audit(csv_of(tmp_path, text), out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_bad_folders(tmp_path):
    with pytest.raises(SystemExit, match='does not exist'): run_audit(tmp_path/'nowhere', out=str(tmp_path/'out'))
    with pytest.raises(SystemExit, match='holds no images in folders'): run_audit(tmp_path, out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_messages_name_options_that_there_are(tmp_path):
    known = anno_parser(jocor_audit.__wrapped__).format_help()
    with pytest.raises(ValueError) as e: read_labels(csv_of(tmp_path, 'image,label\na.png,x\n'))
    named = re.findall('--[a-z_-]+', str(e.value))
    assert len(named) == 2 and all(o in known for o in named)

# decisions

def test_apply(audited, tmp_path, capsys):
    root,names,out = audited
    s = read_table(out/'suspects.csv')
    r = s[['position', 'item', 'given_label', 'predicted_label']]
    r = r.assign(decision=(['relabel', 'drop', 'keep']*len(s))[:len(s)])
    write_table(r, tmp_path/'reviewed.csv', index=False)
    run_audit(root, apply=str(tmp_path/'reviewed.csv'), out=str(tmp_path/'new'))
    want = dict(zip(*read_labels(root).to_numpy().T))
    for o in r.itertuples():
        if o.decision == 'drop': del want[o.item]
        if o.decision == 'relabel': want[o.item] = o.predicted_label
    new = read_table(tmp_path/'new'/'cleaned.csv')
    assert dict(zip(new.file, new.label)) == want
    n = r.decision.value_counts()
    assert f"{n['drop']} dropped, {n.relabel} relabelled, {len(want)} left" in capsys.readouterr().out
    again = read_labels(tmp_path/'new'/'cleaned.csv')
    assert dict(zip(again.file, again.label)) == want

LABELS = pd.DataFrame(dict(file=['a', 'b', 'c'], label=['x', 'y', 'x']))
REVIEWED = pd.DataFrame([['a', 'x', 'y', 'relabel'], ['b', 'y', 'x', 'drop']],
                        columns=['item', 'given_label', 'predicted_label', 'decision'])

@pytest.mark.parametrize('change,message', [
    (dict(decision='maybe'), 'must be keep, relabel or drop'), (dict(item='x.png'), 'not among the files'),
    (dict(given_label='other'), "was reviewed as 'other'"), (dict(item='a', given_label='x'), 'more than once')])
def test_decisions_that_do_not_fit(change, message):
    assert apply_reviewed(LABELS, REVIEWED).values.tolist() == [['a', 'y'], ['c', 'x']]
    with pytest.raises(ValueError, match=message): apply_reviewed(LABELS, REVIEWED.assign(**change))

def test_decisions_without_a_column():
    for o in REVIEWED:
        with pytest.raises(ValueError, match=f"no column '{o}'"): apply_reviewed(LABELS, REVIEWED.drop(columns=o))

def test_apply_keeps_the_columns_of_the_list(tmp_path):
    source = csv_of(tmp_path, 'name,fold,cls\na,0,x\nb,1,y\nc,0,x\n')
    REVIEWED.to_csv(tmp_path/'r.csv', index=False)
    args = dict(file_col='name', label_col='cls', apply=str(tmp_path/'r.csv'))
    run_audit(source, out=str(tmp_path/'new'), **args)
    assert (tmp_path/'new'/'cleaned.csv').read_text() == 'name,fold,cls\na,0,y\nc,0,x\n'
    with pytest.raises(SystemExit, match='would write over'):
        run_audit(tmp_path/'new'/'cleaned.csv', out=str(tmp_path/'new'), **args)
    with pytest.raises(SystemExit, match='does not exist: export'):
        run_audit(source, **args | dict(apply=str(tmp_path/'no.csv')))
