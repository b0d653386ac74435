"The figures of benchmarks/find.py, and a dry run of its ways"
import json, numpy as np, pandas as pd, pytest, torch
from functools import partial
from pathlib import Path
from fastai.vision.all import resnet18
from fastcore.test import test_close as close
from pictures import digit_files

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def find(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import find, find_ways
    monkeypatch.setattr(find, 'FILE', tmp_path/'find.csv')
    monkeypatch.setattr(find_ways, 'default_epochs', lambda n: 12)
    for name in ('Found','pixels'): monkeypatch.setattr(find, name, getattr(find_ways, name), raising=False)
    return find

WRONG = np.array([True,False,True,False,False])

def test_figures(find):
    p = np.array([.9,.8,.7,.1,.2])
    row = find.figures(find.Found(p, p > .75, p, 2.7, 1, 3), WRONG)
    close(row.pop('average_precision'), (1+2/3)/2)
    close(row.pop('ece'), (.1+.8+.3+.1+.2)/5)    # each in a bin of its own
    assert row == dict(items=5, wrong=2, precision_at_n=.5, listed=2, precision=.5, recall=.5, expected=2.7, low=1,
                       high=3, holds=1.)
    assert find.figures(find.Found(p, p > 2, p, 4, 3, 5), WRONG)['holds'] == 0
    row = find.figures(find.Found(p, p > .5, np.array([np.nan,0,.2,.2,.2])), WRONG & False)    # all labels are right
    assert 'average_precision' not in row and row['precision'] == 0
    close(row['ece'], .6/4)

def test_figures_of_a_way_that_tells_less(find):
    "An item without a score is the last; a way without a list, a number or probabilities has none of their figures"
    row = find.figures(find.Found(np.array([np.nan,-3,-1,-4,-5])), WRONG)
    close(row['average_precision'], (1+2/5)/2)
    assert 'listed' not in row and np.isnan([row[o] for o in ('expected','low','high','holds','ece')]).all()
    assert np.isnan(find.figures(find.Found(np.ones(5), np.zeros(5, bool)), WRONG)['precision'])

def frame(find):
    ways = [('audit_3','p_wrong',.9), ('lr','self_confidence',.7), ('lr','normalized_margin',.8),
            ('top_loss','loss',.95)]
    rows = [dict(data='digits', noise='symmetric 20', seed=seed, way=way, score=score, average_precision=v+.01*seed)
            for seed in (0,2) for way,score,v in ways]
    return pd.DataFrame(rows, columns=find.COLUMNS)

def test_tables(find):
    t = find.by_way(frame(find), 'average_precision')
    assert list(t.columns) == ['audit_3','lr self_confidence','lr normalized_margin','top_loss']
    close(t.loc[('digits','symmetric 20'),'lr self_confidence'], .71)
    t = find.against_best(frame(find))
    assert t['audit_3 − best'].round(6).tolist() == [10,10] and t.best.round(6).tolist() == [80,82]
    assert set(t.way) == {'lr normalized_margin'}

def test_the_most_telling_first(find):
    keys = find.order(['features','clothing'], ['audit_3','mlp','audit_2'], 2)
    assert len(keys) == len(set(keys)) == 3*2*(6+3) and keys[0] == ('features','worse',0,'audit_3')
    ways = [way for _,_,_,way in keys]
    assert ways.index('audit_2') == 2*2*(6+3) and ('clothing','symmetric 15',1,'mlp') in keys

def few(find, monkeypatch, n=320):
    d = find.pixels(None, 0)
    d = d._replace(x=d.x[:n], y=d.y[:n])
    monkeypatch.setitem(find.tables, 'digits', find.tables['digits']._replace(source=lambda path, seed: d))

def test_dry_run(find, monkeypatch, tmp_path):
    few(find, monkeypatch, 400)
    ways = ['audit_3','ledger','neighbours','top_loss','fit_3']
    for way in ways: find.do_run(('digits','symmetric 20',0,way), tmp_path)
    t = find.rows().set_index('way')
    assert list(t.index) == ways and (t['items'] == 400).all()
    assert (t.average_precision > .8).all() and t.listed.notna().tolist() == [True,True,True,False,True]
    assert t.ece.notna().tolist() == [True,False,False,False,True]
    assert t.low.notna().tolist() == [True,True,False,False,True]

def test_dry_run_of_cleanlab(find, monkeypatch, tmp_path):
    pytest.importorskip('cleanlab')
    few(find, monkeypatch)
    for way in ('lr','mlp'): find.do_run(('digits','symmetric 20',0,way), tmp_path)
    t = find.named(find.rows())
    assert set(t.way) == {f'{way} {o}' for way in ('lr','mlp') for o in ('self_confidence','normalized_margin')}
    assert (t.average_precision > .8).all() and t.ece.notna().all() and (t.expected > 0).all()

def test_dry_run_of_datalab(find, monkeypatch, tmp_path):
    for name in ('cleanlab','datasets'): pytest.importorskip(name)
    few(find, monkeypatch)
    find.do_run(('digits','symmetric 20',0,'datalab'), tmp_path)
    row = find.rows().iloc[0]
    assert row.average_precision > .8 and row.listed > 0 and 0 <= row.ece <= 1

def test_missing_data_are_named(find, tmp_path, capsys):
    find.do_run(('clothing','symmetric 30',0,'lr'), tmp_path)
    assert 'clothing_features.npz' in capsys.readouterr().out and not find.FILE.exists()

def test_print_tables(find, capsys):
    find.print_tables(frame(find))
    out = capsys.readouterr().out
    assert 'audit_3 − best' in out and out.index('lr self_confidence') < out.index('top_loss')

def test_the_stages_of_an_audit_are_timed(find, monkeypatch, tmp_path):
    import audit_time
    torch.save(resnet18(weights=None).state_dict(), tmp_path/'weights.pth')
    monkeypatch.setattr(audit_time, 'FILE', tmp_path/'audit_time.json')
    audit_time.main(str(digit_files(tmp_path/'digits', 90)), weights=str(tmp_path/'weights.pth'), size=32)
    row = json.loads(audit_time.FILE.read_text())
    for part in (row['first'],row['again']):
        assert set(part) == {*audit_time.stages,'all'} and min(part.values()) >= 0
    assert row['size'] == 32 and row['items'] == len(list((tmp_path/'digits').rglob('*.png')))

def test_a_small_folder_is_audited_by_the_command(find, monkeypatch, tmp_path):
    "One in five pictures is moved, and what the command lists is counted by the names of the files"
    import small_audit
    torch.save(resnet18(weights=None).state_dict(), tmp_path/'weights.pth')
    digits = digit_files(tmp_path/'digits', 600)
    for f in digits.rglob('*.png'): f.rename(f.with_suffix('.jpg'))
    made = dict(n_classes=3, n=45, rate=.2)
    folder = small_audit.make_folder(digits, tmp_path/'made', 0, **made)
    wrong = [f for f in folder.rglob('*.jpg') if small_audit.is_wrong(f)]
    assert len(list(folder.rglob('*.jpg'))) == 135 and 15 < len(wrong) < 40
    assert all(f.name.split('_')[0] != f.parent.name for f in wrong)
    monkeypatch.setattr(small_audit, 'make_folder', partial(small_audit.make_folder, **made))
    row = small_audit.run(digits, 32, 0, 'resnet18', str(tmp_path/'weights.pth'))
    assert row['items'] == 135 and row['wrong'] == len(wrong) and 0 <= row['low'] <= row['high'] <= 135
    def told(folder, out, *args):
        files = [f.relative_to(folder).as_posix() for f in sorted(folder.rglob('*.jpg'))]
        moved = [f for f in files if f.split('/')[0] != f.split('/')[1].split('_')[0]]
        right = [f for f in files if f not in moved]
        return 1., 'About 9 of 135 labels are wrong, between 4 and 30.', pd.Series(moved[:6]+right[:2])
    monkeypatch.setattr(small_audit, 'audit', told)
    row = small_audit.run(digits, 32, 0, 'resnet18', None)
    assert (row['precision'],row['listed'],row['low'],row['high']) == (.75,8,4,30)
    close(row['recall'], 6/len(wrong))
    df = pd.DataFrame([dict(row, precision=p, recall=.5) for p in (.6,.8)])
    close(small_audit.summary(df).loc[32,'precision'], .7)

def test_a_table_without_cleanlab(find):
    "Rows of an audit that cleanlab has no row beside are left out of the comparison"
    df = frame(find)
    assert len(find.against_best(pd.concat([df, df[df.way == 'audit_3'].assign(seed=5)]))) == 2
