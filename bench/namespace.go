//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Set in a process that this one starts.
const (
	childEnv  = "ACCEPTQ_BENCH_MEASUREMENT" // it measures, in namespaces of its own
	tracedEnv = "ACCEPTQ_BENCH_TRACED"      // it serves, and its system calls are counted
)

// inNamespace starts this program again, in a network and mount namespace that is
// made for one measurement: there it may set sysctls, the counters start at 0, and
// it reaches nothing but its own loopback. Without root a user namespace is made
// too.
func inNamespace(m measurement, c config) (*Result, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %v", childEnv, m.name, c.rounds, c.short))
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("a namespace cannot be made here (%w): run as root, or allow unprivileged user namespaces", err)
	}
	var result Result
	decodeErr := json.NewDecoder(r).Decode(&result)
	if err := cmd.Wait(); err != nil {
		return nil, err
	}
	return &result, decodeErr
}

// child does the work of a process that this program started, if it is one.
func child() (done bool, err error) {
	if job := os.Getenv(tracedEnv); job != "" {
		return true, serveTraced(job)
	}
	job := strings.Fields(os.Getenv(childEnv))
	if len(job) != 3 {
		return false, nil
	}
	i := slices.IndexFunc(measurements, func(m measurement) bool { return m.name == job[0] })
	if i < 0 {
		return true, fmt.Errorf("no measurement %q", job[0])
	}
	var c config
	if c.rounds, err = strconv.Atoi(job[1]); err != nil {
		return true, err
	}
	c.short = job[2] == "true"
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return true, err
	}
	if err := loopbackUp(); err != nil {
		return true, fmt.Errorf("loopback: %w", err)
	}
	// Clients of many rounds: all ports that need no privilege.
	if err := setSysctl("net.ipv4.ip_local_port_range", "1024 65535"); err != nil {
		return true, err
	}
	result, err := measurements[i].run(c)
	if err != nil {
		return true, err
	}
	result.Name = job[0]
	return true, json.NewEncoder(os.NewFile(3, "result")).Encode(result)
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// setSysctl sets a sysctl of the namespace of this process.
func setSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0)
}
