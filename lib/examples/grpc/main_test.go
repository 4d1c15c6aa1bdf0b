package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/o7s/o7s-router/lib/ipc"
)

// TestMain runs the tests against a daemon of their own, built from this tree.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "o7s-grpc")
		if err != nil {
			return fail(err)
		}
		defer os.RemoveAll(dir)
		router := filepath.Join(dir, "o7s-router")
		build := exec.Command("go", "build", "-o", router, "./cmd/o7s-router")
		build.Dir = "../../.."
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fail(err)
		}
		run := filepath.Join(dir, "run")
		daemon := exec.Command(router, "daemon", "--no-xdp", "--run-dir", run)
		daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
		log, err := daemon.StderrPipe()
		if err == nil {
			err = daemon.Start()
		}
		if err != nil {
			return fail(err)
		}
		defer func() {
			_ = daemon.Process.Signal(syscall.SIGTERM)
			_ = daemon.Wait()
		}()
		for lines := bufio.NewScanner(log); ; {
			if !lines.Scan() {
				return fail(fmt.Errorf("the daemon does not serve"))
			}
			if strings.Contains(lines.Text(), "msg=serving ") {
				break
			}
		}
		go func() { _, _ = io.Copy(io.Discard, log) }()
		os.Setenv("O7S_RUN_DIR", run)
		return m.Run()
	}())
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// start runs the server of the example, and returns a function that ends it.
func start(t *testing.T, name string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, name) }()
	c, err := ipc.Dial(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		var list ipc.ListResult
		if _, err := c.Call(t.Context(), ipc.OpList, ipc.ListArgs{What: "names", Prefix: name}, &list); err != nil {
			t.Fatal(err)
		}
		if len(list.Names) == 1 && list.Names[0].Accepting > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server does not accept: %+v", list)
		}
	}
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestEcho(t *testing.T) {
	stop := start(t, "echo.example")
	defer stop()
	c, err := connect("echo.example")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 50 { // at the same time, on one flow
		wg.Go(func() {
			word := strings.Repeat(fmt.Sprintf("word %d ", i), 1+i*100)
			if got, err := echoOnce(ctx, c, word); err != nil || got != strings.ToUpper(word) {
				t.Errorf("call %d: %d bytes of %d, %v", i, len(got), len(word), err)
			}
		})
	}
	wg.Wait()
	s, err := echoEach(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		word := strings.Repeat("x", i*300)
		out := new(wrapperspb.StringValue)
		if err := s.SendMsg(wrapperspb.String(word)); err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(out); err != nil || out.Value != strings.ToUpper(word) {
			t.Fatalf("message %d: %d bytes, %v", i, len(out.Value), err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Error(err)
	}
	if err := s.RecvMsg(new(wrapperspb.StringValue)); err != io.EOF {
		t.Errorf("end of the stream: %v", err)
	}
	stop()
	stop = start(t, "echo.example") // a client finds a server that was restarted
	defer stop()
	got, err := echoOnce(ctx, c, "again", grpc.WaitForReady(true))
	if err != nil || got != "AGAIN" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestUnknownName(t *testing.T) {
	c, err := connect("nobody.example")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = echoOnce(t.Context(), c, "hello")
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "nobody.example") {
		t.Errorf("%v", err)
	}
}
