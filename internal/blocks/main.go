// Command blocks checks the fenced blocks of Markdown files:
//
//   - a Go block is a program that go vet accepts, or a fragment that gofmt can parse. In
//     the README a fragment must compile too: functions, or the body of one.
//   - a shell block parses, and one that consists of go commands runs without error
//
// A comment <!-- not run: why --> before a shell block keeps it from being run. With -n
// no block is run.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	dry := flag.Bool("n", false, "run and build nothing")
	flag.Parse()
	failed := flag.NArg() == 0
	blocks := 0
	for _, name := range flag.Args() {
		text, err := os.ReadFile(name)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			failed = true
		}
		for _, b := range read(name, string(text)) {
			blocks++
			if err := b.check(*dry); err != nil {
				fmt.Fprintf(os.Stderr, "%s:%d: %v\n", b.page, b.line, err)
				failed = true
			}
		}
	}
	fmt.Printf("%d pages, %d blocks\n", flag.NArg(), blocks)
	if failed {
		os.Exit(1)
	}
}

// A block is a fenced code block.
type block struct {
	page   string
	line   int
	kind   string // the word after the fence: sh, go, ...
	text   string
	notRun string // the reason not to run it
}

var (
	fence  = regexp.MustCompile("^\\s*```(\\w*)$")
	notRun = regexp.MustCompile(`^<!-- not run: (.+) -->$`)
)

// read returns the blocks of a page.
func read(name, text string) (blocks []block) {
	var open *block
	why, number := "", 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimRight(line, "\n")
		switch m := fence.FindStringSubmatch(line); {
		case m != nil && open == nil:
			open = &block{page: name, line: number, kind: m[1], notRun: why}
		case m != nil:
			blocks = append(blocks, *open)
			open, why = nil, ""
		case open != nil:
			open.text += line + "\n"
		case notRun.MatchString(line):
			why = notRun.FindStringSubmatch(line)[1]
		case line != "":
			why = ""
		}
	}
	if open != nil {
		open.kind = "not closed"
		blocks = append(blocks, *open)
	}
	return blocks
}

func (b block) check(dry bool) error {
	switch b.kind {
	case "go":
		return b.checkGo(dry)
	case "sh", "bash":
		return b.checkShell(dry)
	case "not closed":
		return errors.New("the block is not closed")
	}
	return nil
}

// checkGo parses a fragment, and vets a program.
func (b block) checkGo(dry bool) error {
	program, folder := b.program()
	if err := run(b.text, "gofmt", "-e"); err != nil || dry || program == "" {
		return err
	}
	dir, err := os.MkdirTemp(folder, ".pages")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(program), 0o666); err != nil {
		return err
	}
	return run("", "go", "-C", folder, "vet", "./"+filepath.Base(dir))
}

// imports are what a fragment of the README may use.
var imports = map[string]string{
	"acceptq":     "github.com/acceptq/acceptq",
	"acceptqotel": "github.com/acceptq/acceptq/otel",
	"acceptqprom": "github.com/acceptq/acceptq/prom",
	"context":     "context",
	"graceful":    "github.com/acceptq/acceptq/graceful",
	"http":        "net/http",
	"log":         "log",
	"otel":        "go.opentelemetry.io/otel",
	"overload":    "github.com/acceptq/acceptq/overload",
	"prometheus":  "github.com/prometheus/client_golang/prometheus",
	"time":        "time",
}

var selector = regexp.MustCompile(`\b([a-z]+)\.[A-Z]`)

// program returns the program to vet and a folder of the module that has its imports. A
// fragment of another page than the README has no program.
func (b block) program() (text, folder string) {
	text = b.text
	if !strings.HasPrefix(text, "package ") {
		if b.page != "README.md" {
			return "", ""
		}
		if text = b.text + "\nfunc main() {}\n"; !strings.HasPrefix(b.text, "func ") {
			text = "\nfunc main() {\n" + b.text + "}\n"
		}
		used := make(map[string]bool)
		for _, m := range selector.FindAllStringSubmatch(b.text, -1) {
			if from := imports[m[1]]; from != "" && !used[from] {
				used[from] = true
				text = fmt.Sprintf("import %s %q\n", m[1], from) + text
			}
		}
		text = "package main\n" + text
	}
	for _, module := range []string{"prom", "otel"} {
		if strings.Contains(text, `"github.com/acceptq/acceptq/`+module+`"`) {
			return text, module
		}
	}
	return text, "."
}

// checkShell parses a block, and runs it if it can run anywhere.
func (b block) checkShell(dry bool) error {
	if err := run(b.text, "bash", "-n"); err != nil || dry {
		return err
	}
	switch {
	case b.notRun != "":
		fmt.Printf("%s:%d: not run: %s\n", b.page, b.line, b.notRun)
	case b.runs():
		fmt.Printf("%s:%d: runs\n", b.page, b.line)
		return run("", "bash", "-euo", "pipefail", "-c", b.text)
	}
	return nil
}

// runs reports whether all commands can run anywhere: they change nothing outside the
// build cache, and need no privilege and no other program.
func (b block) runs() bool {
	some := false
	for line := range strings.Lines(b.text) {
		words := strings.Fields(line)
		words = slices.DeleteFunc(words, func(w string) bool { return strings.Contains(w, "=") && !strings.HasPrefix(w, "-") })
		switch {
		case len(words) == 0 || strings.HasPrefix(words[0], "#"):
		case words[0] == "cd":
		case words[0] == "go" && len(words) > 1 && slices.Contains([]string{"run", "test", "vet", "build", "doc"}, words[1]):
			some = true
		default:
			return false
		}
	}
	return some
}

// run runs a command and returns what it wrote if it fails.
func run(input, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}
