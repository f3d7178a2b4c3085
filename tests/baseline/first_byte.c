// SPDX-License-Identifier: Apache-2.0
//
// The least that a program can do to run a guest: the ioctls that brume makes, one after the other,
// on one thread, with nothing checked that cannot be wrong here. `make bench` measures brume's
// start beside it.
//
//   first_byte KERNEL CMDLINE      KERNEL is an ELF file with a PVH note

#include <elf.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	MEMORY = 128 << 20,
	PVH_NOTE = 18,
	START_INFO = 0x6000,
	MEMORY_MAP = 0x6080,
	CMDLINE = 0x20000,
	COM1 = 0x3f8,
};

static long must(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static int kvm, vm, vcpu;

static void make_vm(char *memory)
{
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid = {
		.head.nent = 256
	};
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	struct kvm_userspace_memory_region region = {
		.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory
	};
	struct kvm_irqfd irq = { .gsi = 4 };
	uint64_t identity = 0xfffbc000;

	kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	must(ioctl(kvm, KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION");
	vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	must(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity), "KVM_SET_IDENTITY_MAP_ADDR");
	must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
	must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	must(ioctl(vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
	must(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	irq.fd = must(eventfd(0, EFD_NONBLOCK), "eventfd");
	must(ioctl(vm, KVM_IRQFD, &irq), "KVM_IRQFD");
	vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	must(ioctl(vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
}

// Copies the kernel to memory and returns its PVH entry point.
static uint32_t load(const char *path, const char *cmdline, char *memory)
{
	int file = must(open(path, O_RDONLY), path);
	Elf64_Ehdr head;
	Elf64_Phdr parts[16];
	uint32_t entry = 0;

	must(pread(file, &head, sizeof head, 0), path);
	must(pread(file, parts, sizeof parts[0] * head.e_phnum, head.e_phoff), path);
	for (int i = 0; i < head.e_phnum; i++) {
		if (parts[i].p_type == PT_LOAD)
			must(pread(file, memory + parts[i].p_paddr, parts[i].p_filesz, parts[i].p_offset), path);
		if (parts[i].p_type == PT_NOTE) {
			struct { Elf64_Nhdr head; char name[4]; uint32_t entry; } note;
			must(pread(file, &note, sizeof note, parts[i].p_offset), path);
			if (note.head.n_type == PVH_NOTE)
				entry = note.entry;
		}
	}
	close(file);

	strcpy(memory + CMDLINE, cmdline);
	// struct hvm_start_info: magic, version, flags, modules, list, cmdline, rsdp, memory map.
	uint64_t info[] = { 0x336ec578 | 1ULL << 32, 0, 0, CMDLINE, 0, MEMORY_MAP, 1 };
	memcpy(memory + START_INFO, info, sizeof info);
	uint64_t map[] = { 0, MEMORY, 1 };
	memcpy(memory + MEMORY_MAP, map, sizeof map);
	return entry;
}

static void set_registers(uint32_t entry)
{
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[2]; } msrs = {
		.head.nmsrs = 2, .entries = { { .index = 0x1a0, .data = 1 }, { .index = 0x2ff, .data = 0x806 } }
	};
	struct kvm_lapic_state apic;
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = entry, .rbx = START_INFO, .rflags = 2, .rsp = 0x8ff0 };
	struct kvm_fpu fpu = { .fcw = 0x37f, .mxcsr = 0x1f80 };
	struct kvm_segment code = {
		.limit = -1, .selector = 0x10, .type = 0xb, .present = 1, .db = 1, .s = 1, .g = 1
	};
	struct kvm_segment data = code;

	data.selector = 0x18;
	data.type = 3;
	must(ioctl(vcpu, KVM_SET_MSRS, &msrs), "KVM_SET_MSRS");
	must(ioctl(vcpu, KVM_GET_LAPIC, &apic), "KVM_GET_LAPIC");
	must(ioctl(vcpu, KVM_SET_LAPIC, &apic), "KVM_SET_LAPIC");
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x11;
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
	must(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
	must(ioctl(vcpu, KVM_SET_FPU, &fpu), "KVM_SET_FPU");
}

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: first_byte KERNEL CMDLINE\n");
		return 2;
	}
	char *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	make_vm(memory);
	set_registers(load(argv[1], argv[2], memory));
	size_t size = must(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	for (;;) {
		must(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "first_byte: exit %u\n", run->exit_reason);
			return 1;
		}
		if (run->io.direction == KVM_EXIT_IO_OUT && run->io.port == COM1) {
			must(write(1, (char *)run + run->io.data_offset, 1), "write");
			return 0;
		}
	}
}
