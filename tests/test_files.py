"Files that are whole or absent, cells that are safe in a spreadsheet, ledgers in files."
import os, sys, tempfile, numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from fastai_jocor.files import (how_to_read, load_ledger, plain_cell, read_table, safe_cell, save_ledger, write_aside,
                                write_table, write_text)

def test_an_old_file_survives_until_the_new_one_is_whole(tmp_path):
    file = tmp_path/'f.txt'
    write_text(file, 'old\n')
    with pytest.raises(KeyboardInterrupt), write_aside(file) as part:
        part.write_text('new')
        assert file.read_text() == 'old\n' and part.parent == tmp_path
        raise KeyboardInterrupt
    assert file.read_text() == 'old\n' and os.listdir(tmp_path) == ['f.txt']
    write_text(file, 'new\r\n')
    assert file.read_bytes() == b'new\r\n' and os.listdir(tmp_path) == ['f.txt']

text = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\x00'), max_size=12)

@pytest.mark.parametrize('start', '=+-@\t\r\n\'')
def test_starts_of_formulas(start):
    assert safe_cell(f'{start}1') == f"'{start}1" and plain_cell(f"'{start}1") == f'{start}1'
    assert safe_cell(f'1{start}') == plain_cell(f'1{start}') == f'1{start}'

@given(st.lists(text, max_size=8))
def test_cells_are_safe_and_come_back(names):
    assert [plain_cell(safe_cell(o)) for o in names] == names
    assert not any(safe_cell(o).startswith(tuple('=+-@\t\r\n')) for o in names)

@given(st.lists(text.filter(lambda s: '\r' not in s), min_size=1, max_size=8))
def test_tables_come_back(names):
    with tempfile.TemporaryDirectory() as tmp:
        write_table(pd.DataFrame({'=name': names, 'n': 1.5}), f'{tmp}/t.csv', index=False)
        assert open(f'{tmp}/t.csv').readline() == "'=name,n\n"
        t = read_table(f'{tmp}/t.csv')
    assert t['=name'].tolist() == names and t.n.tolist() == ['1.5']*len(names)

@pytest.mark.parametrize('name', ('NA','nan','None','null'))
def test_names_that_pandas_takes_for_missing_values(name, tmp_path):
    file = tmp_path/'suspects.csv'
    write_table(pd.DataFrame(dict(label=[name,'cat'], score=[.5,np.nan])), file)
    assert pd.read_csv(file).label.isna().tolist() == [True,False] and read_table(file).label.tolist() == [name,'cat']
    again = eval(how_to_read(file), dict(pd=pd))
    assert again.label.tolist() == [name,'cat']
    write_table(pd.DataFrame(dict(label=['dog','cat'], score=[.5,np.nan])), file)
    assert how_to_read(file) == ''

@pytest.mark.parametrize('content,says', [
    ('file,label\nä.png,x\n'.encode('latin-1'), 'is not UTF-8 text: save it as a CSV in UTF-8'),
    ('file,label\n'.encode('utf-16'), 'is not UTF-8 text: save it as a CSV in UTF-8'),
    (b'', 'is empty: it must begin with a line of column names'), (b'\n\n', 'is empty'),
    (b'a,b\n1,2\n1,2,3\n', 'is no CSV: .*line 3')])
def test_files_that_are_no_csv_are_named(content, says, tmp_path):
    (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(ValueError, match=f"t.csv' {says}"): read_table(tmp_path/'t.csv')

@pytest.fixture
def ledger():
    "A ledger of nine items as `cb.ledger` gives it, with one that was never seen"
    rs = np.random.RandomState(0)
    label = lambda: rs.choice(['=a', 'b', 'NA'], 9).astype(object)
    f = pd.DataFrame(dict(item=range(9), given_label=label(), predicted_label=label(), true_label=label()))
    f['flipped'] = f.given_label != f.true_label
    f['seen'] = np.int32([*range(1, 9), 0])
    for name in ('kept', 'loss', 'prob', 'conf'): f[name] = rs.rand(9)
    for name in ('last_loss', 'recent_loss'): f[name] = rs.randn(9).astype(np.float32)
    f.loc[8, ['predicted_label']] = None
    f.loc[8, ['loss', 'prob', 'last_loss']] = np.nan
    return f.rename_axis('position')

@pytest.mark.parametrize('ending', ('csv', 'parquet'))
def test_a_ledger_in_a_file(ledger, tmp_path, ending):
    if ending == 'parquet': pytest.importorskip('pyarrow')
    save_ledger(ledger, tmp_path/f'l.{ending}')
    got = load_ledger(tmp_path/f'l.{ending}')
    want = ledger.assign(item=ledger['item'].astype(str))
    pd.testing.assert_frame_equal(got, want, check_dtype=False, check_exact=True)
    assert got.flipped.dtype == bool and got.seen.dtype.kind == 'i' and got.last_loss.dtype == np.float32
    for f in (load_ledger, lambda file: save_ledger(ledger, file)):
        with pytest.raises(ValueError, match="l.txt' must end in .parquet or .csv"): f(tmp_path/'l.txt')

def test_parquet_as_others_write_and_read_it(ledger, tmp_path):
    pa,pq = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet')
    save_ledger(ledger, tmp_path/'l.parquet')
    t = pq.read_table(tmp_path/'l.parquet')
    assert t.num_rows == 9 and t.column('item').to_pylist() == [str(o) for o in ledger['item']]
    assert t.column('position').to_pylist() == list(range(9))
    assert t.schema.field('last_loss').type == pa.float32() and t.schema.field('flipped').type == pa.bool_()
    (tmp_path/'broken.parquet').write_bytes(b'no parquet')
    with pytest.raises(pa.ArrowInvalid): load_ledger(tmp_path/'broken.parquet')

def test_parquet_without_pyarrow(ledger, tmp_path, monkeypatch):
    for o in ('pyarrow', 'fastparquet'): monkeypatch.setitem(sys.modules, o, None)
    for f in (load_ledger, lambda file: save_ledger(ledger, file)):
        with pytest.raises(ImportError, match='pyarrow'): f(tmp_path/'l.parquet')
    assert os.listdir(tmp_path) == []
