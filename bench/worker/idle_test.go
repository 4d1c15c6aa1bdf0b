package worker

import "testing"

func TestReadMemory(t *testing.T) {
	m, err := ReadMemory("self")
	if err != nil {
		t.Fatal(err)
	}
	if m.RSS < m.PSS || m.PSS < 1000 {
		t.Errorf("%+v", m)
	}
	if _, err := ReadMemory("0"); err == nil {
		t.Error("memory of no process")
	}
}
