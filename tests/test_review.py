"From images to suspects, and from the page to a clean list of labels."
import json, re, shutil, warnings, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from types import SimpleNamespace
from fastai.vision.all import get_image_files, Normalize, resnet18, set_seed
from fastcore.script import anno_parser
import fastai_jocor.features as features
from fastai_jocor.lab import images, review
from fastai_jocor.files import read_table, write_table
from fastai_jocor.lab.commands import jocor_audit
from fastai_jocor.lab.images import audit_learner, readable
from fastai_jocor.lab.review import _by_file, _next_command, apply_reviewed, read_labels
from pictures import digit_files

@pytest.fixture(scope='module')
def body(tmp_path_factory):
    "Weights of a resnet18, in the place of pretrained ones, which would be downloaded"
    file = tmp_path_factory.mktemp('weights')/'resnet18.pth'
    set_seed(0)
    torch.save(resnet18(weights=None).state_dict(), file)
    return str(file)

def run_audit(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
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
def audited(wrong_pictures, body, tmp_path_factory):
    root,names = wrong_pictures
    files = lambda: {f: f.read_bytes() for f in root.rglob('*') if f.is_file()}
    before,out = files(),tmp_path_factory.mktemp('audit')
    run_audit(root, out=str(out), weights=body, size=32)
    assert files() == before
    return root,names,out

# an audit

def test_an_audit_of_a_folder(audited):
    root,names,out = audited
    s,data = read_table(out/'suspects.csv'),page_data(out)
    assert {f.name for f in out.iterdir()} == {'suspects.csv', 'items.csv', 'suspects.html', 'features'}
    assert [r['item'] for r in data['rows']] == s['item'].tolist()
    assert len(data['bad']) == 2 and all('broken.png' in o for o in data['bad'])
    moved = {f.relative_to(root).as_posix() for f in root.rglob('c0_*') if f.parent.name == names['c1']}
    assert len(moved) > 15 and len(set(s['item']) & moved) > .8*len(moved) and len(s) < 1.3*len(moved)
    columns = (out/'suspects.csv').read_text(encoding='utf-8').splitlines()[0].split(',')
    assert columns[:3] == ['part','position','item'] and len(set(columns)) == len(columns)
    labels = read_labels(root)
    trained = labels[~labels.file.isin(data['bad'])]
    assert trained.file.iloc[s.position.astype(int)].tolist() == s['item'].tolist()
    assert labels.file[[r['position'] for r in data['rows']]].tolist() == s['item'].tolist()
    assert "'=zero" in (out/'suspects.csv').read_text() and names['c1'] in set(s.given_label)
    assert all(r['picture'].startswith('data:image/jpeg;base64,') for r in data['rows'])
    assert '<script>alert' not in (out/'suspects.html').read_text(encoding='utf-8')
    p = s.p_wrong.astype(float)
    assert p.is_monotonic_decreasing and p.between(.5, 1).all()

def test_all_items_are_listed(audited):
    root,_,out = audited
    items,labels = read_table(out/'items.csv'),read_labels(root)
    assert set(items['item']) == set(labels.file) - {o for o in labels.file if 'broken' in o}
    assert dict(zip(items['item'], items.given_label)).items() <= dict(zip(labels.file, labels.label)).items()
    assert set(items.part) == {'train'}

@pytest.mark.parametrize('name', ('n', 'epochs', 'size', 'bs', 'k', 'seed', 'least', 'fine_tune'))
def test_an_audit_refuses_numbers_before_it_trains(name, audited, body, tmp_path):
    bad = -1 if name in ('n', 'seed', 'least', 'fine_tune') else 0
    with pytest.raises(SystemExit, match=f'{name}={bad}'):
        run_audit(audited[0], out=str(tmp_path/'out'), weights=body, **{name: bad})
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('name', ('co_lambda', 'forget_rate'))
def test_an_audit_refuses_shares_before_it_looks_at_pictures(name, wrong_pictures, body, tmp_path):
    with pytest.raises(SystemExit, match=f'{name}=3'):
        run_audit(wrong_pictures[0], out=str(tmp_path/'out'), weights=body, **{name: 3})
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('kwargs,size', [({}, 224), (dict(fine_tune=1), 128), (dict(no_pretrained=True), 128),
                                         (dict(size=64), 64)])
def test_images_are_large_unless_that_is_slow(kwargs, size, wrong_pictures, body, tmp_path, monkeypatch, capsys):
    def looked(*args): raise ValueError(f'size {args[5]}')
    monkeypatch.setattr(review, 'audit_learner', looked)
    with pytest.raises(SystemExit, match=f'size {size}'):
        run_audit(wrong_pictures[0], out=str(tmp_path/'out'), weights=body, **kwargs)
    assert f'{size} by {size} pixels' in capsys.readouterr().out

def csv_of_some(root, folder, step=15):
    "A list of some of the pictures, with the names that they began with as true labels"
    files = sorted(f for f in root.rglob('*.png') if 'broken' not in f.name)[::step]
    names = {f.name[:2]: f.parent.name for f in files[::-1]}
    rows = dict(name=[f.relative_to(root).as_posix() for f in files], cls=[f.parent.name for f in files],
                truth=[names[f.name[:2]] for f in files], part=[('train','valid')[i%4 == 3] for i in range(len(files))])
    pd.DataFrame(rows).to_csv(folder/'l.csv', index=False)
    return folder/'l.csv'

def test_an_interrupted_pass_goes_on(wrong_pictures, body, tmp_path, capsys, monkeypatch):
    source = csv_of_some(wrong_pictures[0], tmp_path, step=5)
    args = dict(path=str(wrong_pictures[0]), file_col='name', label_col='cls', weights=body, size=32, epochs=2)
    read,seen = features.in_order,[]
    def broken(*args):
        "Ctrl-C after one batch"
        for i,x in enumerate(read(*args)):
            if i == 1: raise KeyboardInterrupt
            yield x
    def counted(dl, idxs, *args):
        seen.append((idxs[0], len(idxs)))
        return read(dl, idxs, *args)
    with monkeypatch.context() as m:
        m.setattr(features, 'in_order', broken)
        with pytest.raises(SystemExit, match='same command goes on'): run_audit(source, out=str(tmp_path/'cut'), **args)
    assert not (tmp_path/'cut'/'suspects.csv').exists()
    monkeypatch.setattr(features, 'in_order', counted)
    for out in ('cut', 'whole', 'cut'): run_audit(source, out=str(tmp_path/out), **args)
    n = len(pd.read_csv(source))
    few = 0,8 # which tell whether the file is still right
    assert seen == [few, (64,n-64), (0,n), few]
    of = lambda o: np.load(next((tmp_path/o/'features').glob('*.npy')))
    np.testing.assert_array_equal(of('cut'), of('whole'))
    assert (tmp_path/'cut'/'items.csv').read_bytes() == (tmp_path/'whole'/'items.csv').read_bytes()

def test_columns_for_validation_and_truth(wrong_pictures, body, tmp_path, capsys):
    source = csv_of_some(wrong_pictures[0], tmp_path, step=3)
    args = dict(path=str(wrong_pictures[0]), file_col='name', label_col='cls', weights=body, size=32)
    run_audit(source, out=str(tmp_path/'out'), valid_col='part', true_col='truth', least=0., **args)
    df,s = pd.read_csv(source).set_index('name'),read_table(tmp_path/'out'/'suspects.csv').set_index('item')
    assert s.part.eq(df.part[s.index]).all() and s.true_label.eq(df.truth[s.index]).all()
    assert f'of {len(s)} suspects with a known true label have another one' in capsys.readouterr().out
    for name,message in (('valid_col','valid_col'), ('true_col','true_col')):
        with pytest.raises(SystemExit, match=f"{message}='nothing'"):
            run_audit(source, out=str(tmp_path/'new'), **args, **{name: 'nothing'})
    with pytest.raises(SystemExit, match='must say true or false'):
        run_audit(source, out=str(tmp_path/'new'), valid_col='cls', **args)

def test_truth_that_is_known_of_some(wrong_pictures, body, tmp_path, capsys):
    source = csv_of_some(wrong_pictures[0], tmp_path, step=3)
    df = pd.read_csv(source, dtype=object)
    df.loc[df.index%4 > 0, 'truth'] = ['', ' '][len(df)%2]
    df.to_csv(source, index=False)
    run_audit(source, path=str(wrong_pictures[0]), file_col='name', label_col='cls', weights=body, size=32,
              true_col='truth', least=0., out=str(tmp_path/'out'))
    items,df = read_table(tmp_path/'out'/'items.csv').set_index('item'),df.set_index('name')
    wrong = (df.truth != df.cls).astype(str).where(df.truth.str.strip() != '', '')
    assert items.flipped.eq(wrong[items.index]).all() and set(wrong) == {'True','False',''}
    s = read_table(tmp_path/'out'/'suspects.csv').flipped
    known = s[s != '']
    said = f"{(known == 'True').mean():.0%} of {len(known)} suspects with a known true label have another one"
    assert said in capsys.readouterr().out and len(known) < len(s)

@pytest.mark.parametrize('wrong,says', [('other', "Error.* in loading state_dict"), ('list', ''), ('damaged', '')])
@pytest.mark.parametrize('arch', ('resnet34', 'tf_efficientnet_lite0'))
def test_weights_that_do_not_fit(arch, wrong, says, wrong_pictures, body, tmp_path):
    file = tmp_path/'w.pth'
    if wrong == 'other': shutil.copy(body, file)
    elif wrong == 'list': torch.save([1, 2], file)
    else: file.write_bytes(b'no weights')
    with pytest.raises(SystemExit) as e:
        run_audit(wrong_pictures[0], out=str(tmp_path/'out'), weights=str(file), arch=arch, size=32)
    message = str(e.value)
    assert re.search(f"weights={str(file)!r} do not fit arch='{arch}': {says}.+", message) and '\n' not in message

@pytest.mark.parametrize('how', (dict(no_pretrained=True), dict(fine_tune=1)))
def test_the_body_is_trained(how, wrong_pictures, body, tmp_path):
    source = csv_of_some(wrong_pictures[0], tmp_path, step=25)
    given = {} if 'no_pretrained' in how else dict(weights=body)
    run_audit(source, path=str(wrong_pictures[0]), file_col='name', label_col='cls', out=str(tmp_path/'out'), size=32,
              epochs=1, k=2, **given, **how)
    assert len(read_table(tmp_path/'out'/'items.csv')) == len(pd.read_csv(source))

def test_without_weights_it_says_what_to_do(wrong_pictures, tmp_path, monkeypatch):
    import torchvision.models._api as api
    def no_network(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(api, 'load_state_dict_from_url', no_network)
    with pytest.raises(SystemExit, match='no route to host.*--weights, or pass --no-pretrained'):
        run_audit(wrong_pictures[0], out=str(tmp_path/'out'), size=32)

# labels that cannot be audited

@pytest.mark.parametrize('text,message', [
    ('file,label\na.png,x\na.png,y\n', 'names 1 files more than once'),
    ('file,label\nb.png,x\na.png,x\n./a.png,y\n', "one file in two ways, 'a.png' and './a.png'"),
    ('file,label\na.png,x\nd/../a.png,y\n', "one file in two ways, 'a.png' and 'd/../a.png'"),
    ('file,label\n', 'holds 0 class'),
    ('', "labels.csv' is empty"),
    ('file,label\na.png,x\nb.png,x\n', 'holds 1 class'),
    ('file,label\na.png,x\nb.png,\nc.png,y\n', "no label to 1 of 3 files, such as 'b.png'"),
    ('file,label\na.png,x\nb.png,x \n', "spaces around them, such as 'x '"),
    ('image,label\na.png,x\n', "has no column 'file'"),
    ('file,label\na.png,x\nb.png,y\n', 'cannot be read')])
def test_bad_lists(tmp_path, text, message):
    with pytest.raises(SystemExit, match=message): run_audit(csv_of(tmp_path, text), out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_absolute_and_relative_names_of_a_file(tmp_path):
    text = f'file,label\na.png,x\n{tmp_path}/pics/a.png,y\n'
    with pytest.raises(SystemExit, match='one file in two ways'):
        run_audit(csv_of(tmp_path, text), path=str(tmp_path/'pics'), out=str(tmp_path/'out'))
    assert len(read_labels(tmp_path/'labels.csv')) == 2 # of another folder

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
    want = {f: o for f,o in read_labels(root).itertuples(index=False) if 'broken' not in f}
    for o in r.itertuples():
        if o.decision == 'drop': del want[o.item]
        if o.decision == 'relabel': want[o.item] = o.predicted_label
    new = read_table(tmp_path/'new'/'cleaned.csv')
    assert dict(zip(new.file, new.label)) == want
    n = r.decision.value_counts()
    said = capsys.readouterr().out
    assert f"{n['drop']} dropped, {n.relabel} relabelled, {len(want)} left" in said
    assert re.search("2 files are left out because they cannot be read, such as '.*broken.png'", said)
    again = read_labels(tmp_path/'new'/'cleaned.csv')
    assert dict(zip(again.file, again.label)) == want

LABELS = pd.DataFrame(dict(file=['a', 'b', 'c'], label=['x', 'y', 'x']))
REVIEWED = pd.DataFrame([['a', 'x', 'y', 'relabel'], ['b', 'y', 'x', 'drop']],
                        columns=['item', 'given_label', 'predicted_label', 'decision'])

@pytest.mark.parametrize('change,message', [
    (dict(decision='maybe'), "row 2: decision 'maybe' for 'a' must be keep, relabel or drop"),
    (dict(predicted_label=''), "row 2: predicted_label of 'a' is empty: it must be the new label"),
    (dict(predicted_label=[' ','']), "row 2: predicted_label of 'a' is empty"),
    (dict(predicted_label=[None,'x']), "row 2: predicted_label of 'a' is empty"),
    (dict(item='x.png'), 'not among the files'),
    (dict(given_label='other'), "was reviewed as 'other'"), (dict(item='a', given_label='x'), 'more than once')])
def test_decisions_that_do_not_fit(change, message):
    assert apply_reviewed(LABELS, REVIEWED).values.tolist() == [['a', 'y'], ['c', 'x']]
    with pytest.raises(ValueError, match=message): apply_reviewed(LABELS, REVIEWED.assign(**change))

def test_decisions_without_a_column():
    for o in REVIEWED:
        with pytest.raises(ValueError, match=f"no column '{o}'"): apply_reviewed(LABELS, REVIEWED.drop(columns=o))

def test_a_label_is_dropped_without_a_new_one():
    assert apply_reviewed(LABELS, REVIEWED.assign(predicted_label=['y',''])).values.tolist() == [['a','y'], ['c','x']]

def named_pictures(folder, *names):
    "Pictures without an ending"
    for o in names: Image.new('RGB', (4,4)).save(folder/o, format='PNG')

@pytest.mark.parametrize('change,message', [
    (dict(predicted_label=''), "row 2: predicted_label of 'a' is empty"),
    (dict(decision=['drop','delet']), "row 3: decision 'delet' for 'b' must be keep, relabel or drop")])
def test_decisions_are_checked_before_anything_is_written(change, message, tmp_path):
    source,file = csv_of(tmp_path, 'file,label\na,x\nb,y\nc,x\n'),tmp_path/'r.csv'
    named_pictures(tmp_path, *'abc')
    REVIEWED.assign(**change).to_csv(file, index=False)
    with pytest.raises(SystemExit) as e:
        run_audit(source, apply=str(file), out=str(tmp_path/'new'), copy_to=str(tmp_path/'clean'))
    assert f'apply={str(file)!r}, {message}' in str(e.value)
    assert not (tmp_path/'new').exists() and not (tmp_path/'clean').exists()

def test_a_cleaned_list_has_only_files_that_can_be_read(tmp_path, capsys):
    "One is damaged, one is cut off, one is missing"
    source = csv_of(tmp_path, 'file,label\na,x\nb,y\nc,x\nd,y\ndamaged,x\ncut,y\nmissing,x\n')
    named_pictures(tmp_path, *'abcd')
    (tmp_path/'damaged').write_text('no image')
    (tmp_path/'cut').write_bytes((tmp_path/'d').read_bytes()[:40])
    REVIEWED.to_csv(tmp_path/'r.csv', index=False)
    args = dict(apply=str(tmp_path/'r.csv'), out=str(tmp_path/'new'))
    run_audit(source, copy_to=str(tmp_path/'clean'), **args)
    assert (tmp_path/'new'/'cleaned.csv').read_text() == 'file,label\na,y\nc,x\nd,y\n'
    copied = {o.relative_to(tmp_path/'clean').as_posix() for o in (tmp_path/'clean').glob('*/*')}
    assert copied == {'y/a','x/c','y/d'}
    said = capsys.readouterr().out
    assert '1 dropped, 1 relabelled, 3 left' in said
    assert "3 files are left out because they cannot be read, such as 'damaged'" in said
    (tmp_path/'elsewhere').mkdir()
    with pytest.raises(SystemExit, match="7 of 7 images cannot be read, such as '.*elsewhere/a'"):
        run_audit(source, path=str(tmp_path/'elsewhere'), **args)

def test_the_command_that_applies_names_what_the_audit_was_told():
    assert _next_command('my images', None, 'file', 'label') == "jocor_audit 'my images' --apply reviewed.csv"
    command = 'jocor_audit l.csv --path pics --file-col name --label-col cls --apply reviewed.csv'
    assert _next_command('l.csv', 'pics', 'name', 'cls') == command

def test_apply_keeps_the_columns_of_the_list(tmp_path):
    source = csv_of(tmp_path, 'name,fold,cls\na,0,x\nb,1,y\nc,0,x\n')
    named_pictures(tmp_path, *'abc')
    REVIEWED.to_csv(tmp_path/'r.csv', index=False)
    args = dict(file_col='name', label_col='cls', apply=str(tmp_path/'r.csv'))
    run_audit(source, out=str(tmp_path/'new'), **args)
    assert (tmp_path/'new'/'cleaned.csv').read_text() == 'name,fold,cls\na,0,y\nc,0,x\n'
    with pytest.raises(SystemExit, match='would overwrite'):
        run_audit(tmp_path/'new'/'cleaned.csv', out=str(tmp_path/'new'), **args)
    with pytest.raises(SystemExit, match='does not exist: export'):
        run_audit(source, **args | dict(apply=str(tmp_path/'no.csv')))

def test_cleaned_files_are_copied(wrong_pictures, tmp_path, capsys):
    source = csv_of_some(wrong_pictures[0], tmp_path, step=25)
    df = pd.read_csv(source)
    df.loc[1, 'cls'] = df.cls[0]
    safe = {o: f'class{i}' for i,o in enumerate(df.cls.unique())}
    df.assign(cls=df.cls.map(safe)).to_csv(source, index=False)
    pd.DataFrame(dict(item=df.name[:2], given_label=df.cls[:2].map(safe), predicted_label='class1',
                      decision=['drop','relabel'])).to_csv(tmp_path/'r.csv', index=False)
    args = dict(path=str(wrong_pictures[0]), file_col='name', label_col='cls', apply=str(tmp_path/'r.csv'))
    run_audit(source, out=str(tmp_path/'new'), copy_to=str(tmp_path/'clean'), **args)
    copied = {f.relative_to(tmp_path/'clean').as_posix() for f in (tmp_path/'clean').rglob('*.png')}
    assert len(copied) == len(df)-1 and f"class1/{df.name[1].split('/')[-1]}" in copied
    assert 'ImageDataLoaders.from_folder' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='is not empty'):
        run_audit(source, out=str(tmp_path/'new'), copy_to=str(tmp_path/'clean'), **args)

def test_odd_names_and_a_bom(wrong_pictures, body, tmp_path):
    "Classes that pandas takes for missing, one with a single item, a byte order mark, a file name with a line end"
    root,odd = wrong_pictures[0],tmp_path/'odd'
    odd.mkdir()
    files = sorted(f for f in root.rglob('c*.png'))[::12]
    names = ['nan', 'None', '<b>']
    label = {f.name[:2]: names[i] for i,f in enumerate({f.name[:2]: f for f in files}.values())}
    rows = []
    for i,f in enumerate(files):
        name = f'{i}.png' if i else 'line\nend "quoted".png'
        shutil.copy(f, odd/name)
        rows.append((name, 'NA' if i == 1 else label[f.name[:2]]))
    df = pd.DataFrame(rows, columns=['file','label'])
    df.to_csv(tmp_path/'odd.csv', index=False, encoding='utf-8-sig')
    run_audit(tmp_path/'odd.csv', path=str(odd), out=str(tmp_path/'out'), weights=body, size=32, epochs=5)
    items = read_table(tmp_path/'out'/'items.csv')
    assert set(items.given_label) == {'NA', *names} and 'line\nend "quoted".png' in set(items['item'])
    assert len(items) == len(df)

def test_files_that_were_read_once_are_read_again_only_if_one_changed(tmp_path, monkeypatch):
    df = pd.DataFrame(dict(file=[f'{i}.png' for i in range(500)], label=['a','b']*250))
    for f in df.file: Image.new('RGB', (4,4)).save(tmp_path/f)
    (tmp_path/'7.png').write_bytes(b'no image')
    read = lambda folder: readable(df, tmp_path, folder=folder)[1]
    assert read(tmp_path/'kept') == read(None) == ['7.png']
    with monkeypatch.context() as m:
        m.setattr(images, 'verify_images', lambda files: pytest.fail('read again'))
        assert read(tmp_path/'kept') == ['7.png']
        with pytest.raises(pytest.fail.Exception): read(None)
    (tmp_path/'8.png').write_bytes(b'no image')
    (tmp_path/'9.png').unlink()
    assert read(tmp_path/'kept') == ['7.png','8.png','9.png']

@pytest.mark.parametrize('arch,mean', [('resnet18', .485), ('tf_efficientnet_lite0', .5)])
def test_pictures_are_normalised_as_the_body_knows_them(arch, mean, wrong_pictures, body, tmp_path):
    "Each body once: with the statistics that its weights were trained with"
    import timm
    if arch != 'resnet18':
        body = tmp_path/'weights.pth'
        torch.save(timm.create_model(arch, pretrained=False).state_dict(), body)
    good,_ = readable(read_labels(wrong_pictures[0]), wrong_pictures[0])
    learn = audit_learner(good, wrong_pictures[0], arch, body, size=32, out=tmp_path)
    means = [float(o.mean.flatten()[0]) for o in learn.dls.train.after_batch.fs if isinstance(o, Normalize)]
    assert means == [pytest.approx(mean)]

def test_only_the_folder_of_the_images_goes_from_the_names_in_notes():
    files = ['ba/1.png','ba/2.png']
    found = SimpleNamespace(table=pd.DataFrame(dict(item=[f'a/{o}' for o in files], given_label=['ba','ab'],
        note=['almost equal to a/ba/2.png, labelled ab','unlike all others'])))
    table = _by_file(found, pd.DataFrame(dict(file=files)), 'a').table
    assert table['item'].tolist() == files
    assert table.note.tolist() == ['almost equal to ba/2.png, labelled ab','unlike all others']
