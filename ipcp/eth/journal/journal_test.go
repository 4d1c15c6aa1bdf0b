package journal

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var mac = [6]byte{2, 0, 0, 0, 0, 1}

func open(t *testing.T, path string, mac [6]byte, etherType uint16) (*Journal, []Entry) {
	t.Helper()
	j, left, err := Open(path, mac, etherType, 4096)
	if err != nil {
		t.Fatal(err)
	}
	return j, left
}

// kill is what becomes of a journal whose process was killed.
func (j *Journal) kill() { _ = unix.Munmap(j.mem); j.mem = nil }

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "flows", "eth0-a000")
	j, left := open(t, path, mac, 0xa000)
	if len(left) != 0 {
		t.Errorf("a new journal has %v", left)
	}
	want := []Entry{
		{Local: 64, Remote: 65, MAC: [6]byte{2, 1, 2, 3, 4, 5}},
		{Local: 4095, Remote: 0xfffe, MAC: [6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}},
	}
	for _, e := range want {
		j.Note(e)
	}
	j.Note(Entry{Local: 70, Remote: 1, MAC: mac})
	j.Strike(70)
	j.Note(Entry{Local: 4096, Remote: 1, MAC: mac}) // no such slot
	j.kill()
	j.Note(want[0])

	j, left = open(t, path, mac, 0xa000)
	if d := cmp.Diff(want, left); d != "" {
		t.Error(d)
	}
	j.kill()
	j, left = open(t, path, mac, 0xa000)
	if len(left) != 0 {
		t.Errorf("read twice: %v", left)
	}

	// Of another interface or protocol.
	j.Note(want[0])
	j.kill()
	j, left = open(t, path, [6]byte{2, 0, 0, 0, 0, 2}, 0xa000)
	if len(left) != 0 {
		t.Errorf("another interface's: %v", left)
	}
	j.Note(want[0])
	j.kill()
	j, left = open(t, path, [6]byte{2, 0, 0, 0, 0, 2}, 0xa001)
	if len(left) != 0 {
		t.Errorf("another protocol's: %v", left)
	}
	for range 2 {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the file is left: %v", err)
	}
	j.Strike(64)
	var none *Journal
	none.Note(want[0])
	none.Strike(64)
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever is in the file, it is replaced or read.
func TestJournalOfOthers(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	for _, content := range []string{"", "short", magic + string(make([]byte, 100000))} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		j, left := open(t, path, mac, 0xa000)
		if len(left) != 0 {
			t.Errorf("%v in a file of %d bytes", left, len(content))
		}
		j.Note(Entry{Local: 4095, Remote: 64, MAC: mac})
		j.kill()
		if _, left = open(t, path, mac, 0xa000); len(left) != 1 {
			t.Errorf("%v after a file of %d bytes", left, len(content))
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Open(link, mac, 0xa000, 4096); err == nil {
		t.Error("a symbolic link is followed")
	}
	if _, _, err := Open(filepath.Join(path, "y"), mac, 0xa000, 4096); err == nil {
		t.Error("a file is taken for a directory")
	}
}
