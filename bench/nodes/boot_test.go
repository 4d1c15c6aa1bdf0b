package nodes

import "testing"

func TestSumResident(t *testing.T) {
	const smaps = `00400000-00ba5000 r-xp 00000000 fe:00 9986564                            /usr/bin/o7s-router
Size:               7828 kB
Rss:                1024 kB
VmFlags: rd ex mr mw me
7fbaf3c00000-7fbaf4000000 rw-p 00000000 00:00 0 
Rss:                2048 kB
7fbb01394000-7fbb027fd000 rw-s 00000000 00:10 1038                       anon_inode:bpf-map
Rss:               20900 kB
7fbb01394000-7fbb027fd000 rw-s 00000000 00:10 1038                       socket:[4711]
Rss:                 900 kB
7ffc1ff51000-7ffc1ff72000 rw-p 00000000 00:00 0                          [stack]
Rss:                 512 kB
`
	if got, err := sumResident([]byte(smaps)); err != nil || got != 3.5 {
		t.Errorf("%v MiB, %v", got, err)
	}
}
